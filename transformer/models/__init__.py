"""Networks as pure functions of plain parameter trees; the only package that touches Flax."""
