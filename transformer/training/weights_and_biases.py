"""Weights & Biases as a tracker (extra `tracking`)."""

import dataclasses
import html
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer.config import Config, ConfigError, write_atomically
from transformer.training.tracked import encodable, numbers, package


class WeightsAndBiases:
    """Logs to Weights & Biases; a resumed run goes on under the identity kept in DIR/wandb_run_id."""

    def __init__(self, config: Config, workdir: Path, resume_step: int):
        self._package = package("wandb", "wandb")
        identity = workdir / "wandb_run_id"
        if not identity.exists():
            write_atomically(identity, secrets.token_hex(4))
        try:
            self._run = self._package.init(
                project=config.tracking.wandb_project,
                id=identity.read_text(),
                name=workdir.resolve().name,
                dir=workdir,
                config=dataclasses.asdict(config),
                resume="allow" if resume_step else None,
                settings=self._package.Settings(console="off"),
            )
        except self._package.Error as error:
            raise ConfigError(f"tracking.wandb = True: {error} (WANDB_MODE=offline needs no account)") from error

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.starting_step:  # steps done again after a crash, which the service already has
            self._run.log(values, step=step)

    def log(self, record: Mapping[str, Any]) -> None:
        self._log(record["step"], numbers(record))

    def text(self, step: int, text: str) -> None:
        page = f"<pre>{html.escape(encodable(text))}</pre>"
        self._log(step, {"sample": self._package.Html(page, inject=False)})

    def sync(self) -> None:
        """Nothing to do: a process of its own writes whatever it is given."""

    def close(self) -> None:
        self._run.finish()
