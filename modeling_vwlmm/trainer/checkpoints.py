"""Checkpoints that a run can go on from, whole even if it was killed while it saved."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from ..training_run import read_training_run


UNFINISHED = ".unfinished"
# A run may go on from another place on another machine, where these differ
_NOT_COMPARED = {"resume_from_checkpoint", "output_dir"}


class WholeCheckpoints(Trainer):
    """A [`~transformers.Trainer`] whose checkpoint-N appears under its name once all of it is written.

    A run that is killed while it saves leaves the folder `.unfinished`, which nothing reads and the next save removes.
    A step whose gradient is not finite is an error and is not taken, so no checkpoint holds weights from such a step.
    """

    _is_saving = False

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self._is_saving else run_dir

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        unfinished, name = run_dir / UNFINISHED, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            with _explaining_failures(run_dir / name):
                super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(unfinished / name):
            self.state.best_model_checkpoint = str(run_dir / name)
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
            if (run_dir / name).exists():  # an earlier try left it, and it stays whole until the new one is there
                (run_dir / name).rename(unfinished / "replaced")
            (unfinished / name).rename(run_dir / name)
            shutil.rmtree(unfinished, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with contextlib.nullcontext() if _internal_call else _explaining_failures(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)
            if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.state_dict_type.name != "FULL_STATE_DICT":
                # transformers writes only shards then, from which a run goes on, but which nothing else loads
                self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # transformers pushes while it saves, from a folder that is not whole yet
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # In float16 there is a scaler, which skips such a step by itself
        if grad_norm is not None and self.accelerator.scaler is None and not math.isfinite(grad_norm):
            self.refuse_to_go_on(f"the norm of the gradient is {float(grad_norm)}")
        return grad_norm

    def refuse_to_go_on(self, reason: str) -> NoReturn:
        """Raise a `ValueError` that says where the weights before this step are."""
        last = last_checkpoint(self.args.output_dir)
        raise ValueError(
            f"{reason} at step {self.state.global_step + 1}, from where nothing would be learnt: "
            + (f"the last checkpoint is {last}" if last else "no checkpoint was saved before")
        )

    def _run_epoch(self, **kwargs) -> None:  # type: ignore[override]  # passes on what transformers names
        # A run that was killed after its last step has none left, but transformers would take one more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)


@contextlib.contextmanager
def _explaining_failures(path: str | os.PathLike) -> Iterator[None]:
    """Turn a failure to write a file into an `OSError` of one line that says which checkpoint is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save fails with a RuntimeError that does not say why. Others have another cause
        if isinstance(error, RuntimeError) and "inline_container.cc" not in str(error):
            raise
        parent = Path(path).parent
        free = shutil.disk_usage(parent).free / 2**20
        last = last_checkpoint(parent) or last_checkpoint(path)
        raise OSError(
            f"{path} cannot be written, with {free:.0f} MB free on its disk: {error}"
            + (f"; the last whole checkpoint is {last}" if last else "")
        ) from error


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The last checkpoint-N of a folder, None if there is none."""
    return get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None


def own_checkpoint(output_dir: str | os.PathLike, stages: list[dict]) -> str | None:
    """The checkpoint that a run goes on from: the last one in its folder, None if there is none.

    Args:
        output_dir: of the run.
        stages: the run's record, see [`read_training_run`].

    Raises:
        ValueError: the checkpoint is of another run, which started from another model or with other settings.
    """
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        return None
    found = read_training_run(checkpoint)
    if _comparable(found) != _comparable(stages):
        raise ValueError(
            f"{checkpoint} is of another run ({_difference(found, stages)}): name another output_dir or remove that "
            "one, or go on from it all the same with --resume_from_checkpoint true"
        )
    return checkpoint


def is_finished(output_dir: str | os.PathLike, checkpoint: str) -> bool:
    """Whether the run whose last checkpoint is given has taken all its steps and saved its model."""
    try:
        state = TrainerState.load_from_json(os.path.join(output_dir, TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):
        return False
    same_run = read_training_run(output_dir) == read_training_run(checkpoint)
    return same_run and state.global_step >= state.max_steps


def _comparable(stages: list[dict]) -> list[dict[str, Any]]:
    """What must be equal for two records to be of one run: all but places, versions and the kind of device."""
    compared = []
    for stage in stages:
        recipe = {name: value for name, value in stage.get("recipe", {}).items() if name not in _NOT_COMPARED}
        rest = {name: value for name, value in stage.items() if name not in ("versions", "hardware")}
        processes = (stage.get("hardware") or {}).get("processes")
        compared.append({**rest, "recipe": recipe, "processes": processes})
    return compared


def _difference(found: list[dict], stages: list[dict]) -> str | None:
    if not found:
        return "it has no record of a run"
    if _comparable(found[:-1]) != _comparable(stages[:-1]):
        return f"its model {found[-1].get('base_model')} was trained differently"
    (before,), (now,) = _comparable(found[-1:]), _comparable(stages[-1:])
    for old, new in ((before["recipe"], now["recipe"]), (before, now)):
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if names:
            return ", ".join(f"{name} was {_shown(old, name)}, is {_shown(new, name)}" for name in names)
    return None


def _shown(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "not given"
