"""Recipes: `configs/NAME.py` has a function `get_config() -> Config`; one derives from another by `replace`."""
