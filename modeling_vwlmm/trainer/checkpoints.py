"""Checkpoints that a run can go on from, whole even if it was killed while it saved."""

import contextlib
import functools
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets import IterableDataset
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from ..data.fingerprint import data_fingerprint, what_changed
from ..data.skipping import SkippingCollator
from ..files import replacing
from ..training_run import read_training_run
from .integrity import add_hashes, check_whole, read_contents, what_is_missing, write_contents
from .lock import locked


logger = logging.get_logger(__name__)

UNFINISHED = ".unfinished"
# A run may go on from another place on another machine, where these differ
_NOT_COMPARED = {"resume_from_checkpoint", "output_dir"}


class WholeCheckpoints(Trainer):
    """A [`~transformers.Trainer`] whose checkpoint-N appears under its name once all of it is written.

    A run that is killed while it saves leaves the folder `.unfinished`, which nothing reads and the next save removes.
    A step whose gradient is not finite is an error and is not taken, so no checkpoint holds weights from such a step.
    """

    _is_saving = False
    _hashing: threading.Thread | None = None
    _seen_whole: str | None = None
    stages: list[dict]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, from a checkpoint that is as it was written.

        Raises:
            ValueError: a file of the checkpoint is damaged, or the data hold no batch, so that no step is taken.
        """
        checkpoint: Any = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir) or True  # which transformers refuses
        if isinstance(checkpoint, (str, os.PathLike)):
            for difference in self.differences_to(checkpoint):
                logger.warning(f"going on from {checkpoint}, though {difference}")
        lock = locked(self.args.output_dir) if self.is_world_process_zero() else contextlib.nullcontext()
        with lock, self._once_hashed():
            result = super().train(checkpoint or None, *args, **kwargs)
        if self.state.global_step == 0:
            raise ValueError(
                "no step was taken, and nothing learnt: the data hold no batch of "
                f"{self.args.per_device_train_batch_size} samples"
            )
        return result

    def differences_to(self, checkpoint: str | os.PathLike) -> list[str]:
        """Why a run that goes on from a checkpoint does not end as if it had not stopped; empty if it does.

        Raises:
            ValueError: a file of the checkpoint is missing, or is not as it was written.
        """
        if self.args.should_save and os.fspath(checkpoint) != self._seen_whole:
            check_whole(checkpoint)
            self._seen_whole = os.fspath(checkpoint)
        differences = [f"{what} start(s) anew, of which it has none" for what in what_is_missing(checkpoint)]
        before = read_contents(checkpoint)["data"]
        changed = what_changed(before, self._data_fingerprint) if before and self._data_fingerprint else None
        names = self.stages[-1].get("dataset") or "the data"
        name = names if isinstance(names, str) else " or ".join(names)
        return [*differences, *([f"{name} changed since: {changed}"] if changed else [])]

    @functools.cached_property
    def _data_fingerprint(self) -> dict[str, Any] | None:
        return data_fingerprint(self.train_dataset)

    @contextlib.contextmanager
    def _once_hashed(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._hashing is not None:
                self._hashing.join()

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self._is_saving else run_dir

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_finite()
        run_dir = Path(self._get_output_dir(trial))
        unfinished, name = run_dir / UNFINISHED, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            with self._once_hashed(), _explaining_failures(run_dir / name):
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
            write_contents(unfinished / name, self._data_fingerprint)
            if (run_dir / name).exists():  # an earlier try left it, and it stays whole until the new one is there
                (run_dir / name).rename(unfinished / "replaced")
            (unfinished / name).rename(run_dir / name)
            shutil.rmtree(unfinished, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,  # by step: a clock that was set back makes the newest the oldest
            )
            # Beside the next step: reading back what was written would hold the run up
            self._hashing = threading.Thread(target=add_hashes, args=[run_dir / name])
            self._hashing.start()
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, but what is in the folder stays until all of the model is written beside it."""
        if self._is_saving:
            self._write_model(output_dir)
            return
        self.check_finite()
        folder = Path(output_dir or self.args.output_dir)
        unfinished = folder / UNFINISHED
        with _explaining_failures(folder):
            try:
                self._write_model(os.fspath(unfinished))
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    for path in sorted(path for path in unfinished.rglob("*") if path.is_file()):
                        target = folder / path.relative_to(unfinished)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(path, target)
            finally:
                if self.args.should_save:
                    shutil.rmtree(unfinished, ignore_errors=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _write_model(self, output_dir: str | None) -> None:
        super().save_model(output_dir, _internal_call=True)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.state_dict_type.name != "FULL_STATE_DICT":
            # transformers writes only shards then, from which a run goes on, but which nothing else loads
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def save_state(self) -> None:
        if self.args.should_save:
            with replacing(os.path.join(self.args.output_dir, TRAINER_STATE_NAME)) as path:
                self.state.save_to_json(os.fspath(path))

    def check_finite(self) -> None:
        """`ValueError` if a weight that trains is nan or infinite: what would be saved is worth nothing."""
        weights = (
            (name, _own_share(weight)) for name, weight in self.model.named_parameters() if weight.requires_grad
        )
        bad = next((name for name, share in weights if not share.sum(dtype=torch.float32).isfinite()), None)
        found = self.accelerator.reduce(torch.tensor(float(bad is not None), device=self.args.device), "sum")
        if found.item():
            last = last_checkpoint(self.args.output_dir)
            raise ValueError(
                f"{bad or 'a weight'} is no longer finite after step {self.state.global_step}, so nothing is saved: "
                + (f"the last checkpoint is {last}" if last else "no checkpoint was saved before")
            )

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
            return
        loader, trained = kwargs["train_dataloader"], kwargs["steps_trained_in_current_epoch"]
        if trained and not self.args.ignore_data_skip and isinstance(self.train_dataset, IterableDataset):
            # transformers reads a stream from its beginning, whose batches it drops
            loader.collate_fn = SkippingCollator(loader.collate_fn, trained)
        super()._run_epoch(**kwargs)


def _own_share(weight: Any) -> torch.Tensor:
    """What this device holds of a weight that FSDP or ZeRO-3 spread over devices; all of any other."""
    weight = weight.detach()
    return weight.to_local() if hasattr(weight, "to_local") else getattr(weight, "ds_tensor", weight)


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
        ValueError: the checkpoint, or the finished model, is of another run, which started from another model or with
            other settings.
    """
    checkpoint = last_checkpoint(output_dir)
    found = read_training_run(checkpoint or output_dir) if os.path.isdir(output_dir) else []
    if (checkpoint or found) and not is_of_run(found, stages):
        raise ValueError(
            f"{checkpoint or output_dir} is of another run ({_difference(found, stages)}): name another output_dir or "
            "remove that one, or go on from it all the same with --resume_from_checkpoint true"
        )
    return checkpoint


def is_finished(output_dir: str | os.PathLike, stages: list[dict]) -> bool:
    """Whether the run of this record has taken all its steps and saved its model."""
    try:
        state = TrainerState.load_from_json(os.path.join(output_dir, TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):
        return False
    return is_of_run(read_training_run(output_dir), stages) and 0 < state.max_steps <= state.global_step


def is_of_run(found: list[dict], stages: list[dict]) -> bool:
    """Whether two records, see [`read_training_run`], are of one run. A field that only one has is not compared."""
    if len(found) != len(stages):
        return False
    pairs = zip(_comparable(found), _comparable(stages), strict=True)
    return all(before[name] == now[name] for before, now in pairs for name in before.keys() & now.keys())


def _comparable(stages: list[dict]) -> list[dict[str, Any]]:
    """What must be equal for two records to be of one run: all but places, versions and the kind of device."""
    compared = []
    for stage in stages:
        rest = {name: value for name, value in stage.items() if name not in ("versions", "hardware")}
        if rest.get("base_fingerprint") is None:  # of a model that is quantized or spread over devices
            rest.pop("base_fingerprint", None)
        if "recipe" in rest:
            recipe = rest["recipe"] or {}
            rest["recipe"] = {name: value for name, value in recipe.items() if name not in _NOT_COMPARED}
        if processes := (stage.get("hardware") or {}).get("processes"):
            rest["processes"] = processes
        compared.append(rest)
    return compared


def _difference(found: list[dict], stages: list[dict]) -> str | None:
    if not found:
        return "it has no record of a run"
    if not is_of_run(found[:-1], stages[:-1]):
        return f"its model {found[-1].get('base_model')} was trained differently"
    if difference := difference_of_recipes(found[-1].get("recipe") or {}, stages[-1].get("recipe") or {}):
        return difference
    (before,), (now,) = _comparable(found[-1:]), _comparable(stages[-1:])
    names = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    return _differences(before, now, names)


def difference_of_recipes(found: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    """What an error message says that a recipe differs in, None if in nothing but places."""
    names = (found.keys() | recipe.keys()) - _NOT_COMPARED
    return _differences(found, recipe, sorted(name for name in names if found.get(name) != recipe.get(name)))


def _differences(before: dict[str, Any], now: dict[str, Any], names: list[str]) -> str | None:
    some = ", ".join(f"{name} was {_shown(before, name)}, is {_shown(now, name)}" for name in names[:5])
    return some + (f" and {len(names) - 5} more" if len(names) > 5 else "") or None


def _shown(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "not given"
