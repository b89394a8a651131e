"""Curves of each trial's training in TensorBoard, Weights & Biases or Trackio, by transformers' own callbacks."""

import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import Trainer, TrainerCallback

from ticketops.errors import InputError, spelled
from ticketops.searching.config import Config

#: Split -> prefix of its scores in the Trainer's logs.
PREFIXES = {"validation": "eval", "report": "test"}
#: Points of a trial's curve.
_POINTS = 50
#: Tracker -> its packages, of which one suffices.
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def check_trackers(trackers: tuple[str, ...]) -> None:
    """Makes sure that trackers are installed.

    Args:
        trackers: names of trackers.

    Raises:
        InputError: one is not installed.
    """
    for name in trackers:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
            raise InputError(
                f"{spelled('report_to')} {name} needs a package that is not installed: pip install {name}, or leave "
                f"{name} out"
            )


@dataclass(frozen=True)
class Run:
    """A trial as trackers know it.

    Attributes:
        trackers: names of trackers, keys of `_PACKAGES`.
        folder: output folder of the search, share or transfer. TensorBoard's files go into its `tensorboard/NAME`, and
            its path names the project of the others.
        name: id of the trial.
    """

    trackers: tuple[str, ...]
    folder: Path
    name: str

    @classmethod
    def of(cls, config: Config, name: str) -> "Run | None":
        """The trial of a run with this configuration; None if nothing is to be tracked.

        Args:
            config: configuration with `report_to` and `output`.
            name: id of the trial.
        """
        values: Any = config
        return cls(values.report_to, Path(values.output), name) if values.report_to else None


class Tracker:
    """Reports a trial to its trackers within a `with` block, or does nothing.

    Losses are read beside the Trainer's own logging, which would sum them up in another order, and so change the last
    digits of the mean loss in the record.

    Args:
        run: the trial; None to track nothing.

    Attributes:
        callbacks: the trackers' callbacks, for the Trainer.
        arguments: training arguments that the callbacks read.
    """

    def __init__(self, run: Run | None):
        self._run = run
        self._unset: str | None = None
        self.callbacks: list[TrainerCallback] = []
        self.arguments: dict[str, Any] = {}

    def __enter__(self) -> "Tracker":
        if self._run is None:
            return self
        from transformers.integrations import get_reporting_integration_callbacks

        project = "-".join(part for part in self._run.folder.parts if part not in ("/", ".", ".."))
        self.arguments = {"run_name": self._run.name, "project": project}
        if "wandb" in self._run.trackers and "WANDB_PROJECT" not in os.environ:
            os.environ["WANDB_PROJECT"] = project
            self._unset = "WANDB_PROJECT"
        for name in self._run.trackers:
            (make,) = get_reporting_integration_callbacks([name])
            callback = make()
            if name == "tensorboard":
                callback.logging_dir = str(self._run.folder / "tensorboard" / self._run.name)
                # A trial that runs again would add a second curve.
                shutil.rmtree(callback.logging_dir, ignore_errors=True)
            self.callbacks.append(callback)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for callback in self.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                writer.close()
        for name in self._run.trackers if self._run else ():
            # Otherwise the next trial would go on in the same run.
            if (module := sys.modules.get(name)) is not None and hasattr(module, "finish"):
                with contextlib.suppress(Exception):
                    module.finish()
        if self._unset is not None:
            os.environ.pop(self._unset, None)

    def follow(self, trainer: Trainer) -> None:
        """Logs a Trainer's losses and step sizes.

        Args:
            trainer: Trainer with the callbacks.
        """
        if self._run is not None:
            trainer.add_callback(_Losses(trainer))

    def log_scores(self, trainer: Trainer, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Logs the scores of the trained model.

        Args:
            trainer: Trainer with the callbacks.
            scores: split, "validation" or "report" -> metric, with the task's name in front in a share -> score.
        """
        if self._run is not None:
            trainer.log(
                {f"{PREFIXES[split]}_{name}": value for split, found in scores.items() for name, value in found.items()}
            )


class _Losses(TrainerCallback):
    """Logs the mean loss since the last point, and the step size.

    Args:
        trainer: Trainer whose `training_step` is followed.
    """

    def __init__(self, trainer: Trainer):
        self._trainer, self._step = trainer, trainer.training_step
        self._sum: Any = 0.0
        self._logged = 0
        trainer.training_step = self._followed  # type: ignore[method-assign]

    def _followed(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._step(*args, **kwargs)
        # Stays on the device, so that steps do not wait for it.
        self._sum = self._sum + loss.detach()
        return loss

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs a point, at each fiftieth of the training."""
        if state.global_step % max(state.max_steps // _POINTS, 1) and state.global_step < state.max_steps:
            return
        loss = float(self._sum) / (state.global_step - self._logged)
        self._sum, self._logged = 0.0, state.global_step
        rate = kwargs["optimizer"].param_groups[0]["lr"]
        self._trainer.log({"loss": loss, "learning_rate": float(rate)})
