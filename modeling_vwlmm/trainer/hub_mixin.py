"""Pushes a model to the Hub while it is trained."""

import functools
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import CommitInfo, run_as_future
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from ..hub.push import check_repository, push
from ..hub.repository import fill_repository
from .lock import PUSH_PREFIX


logger = logging.get_logger(__name__)


class HubMixin(Trainer):
    """Makes a [`~transformers.Trainer`] push through [`~modeling_vwlmm.hub.push`], during training and after it.

    A push during training sends a copy of a checkpoint, in the background. If it fails, that is logged as a warning.
    """

    def init_hf_repo(
        self, token: str | None = None, private: bool | None = None, base_model: str | None = None
    ) -> None:
        """Check that the repository can be pushed to. The first push makes it, after the model was seen to load.

        Raises:
            ValueError: there is another model in it, or the arguments would upload what does not belong there.
            OSError: there is no token that may write, or no connection.
        """
        if not self.is_world_process_zero():
            return
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f'hub_strategy is "{self.args.hub_strategy.value}", which uploads optimizer states: expected "end" or '
                '"every_save"'
            )
        config = self.model.config
        if is_peft_model(self.model):
            config, trained_on = None, self.model.active_peft_config.base_model_name_or_path
            if base_model is None and (not trained_on or Path(trained_on).is_dir()):
                raise ValueError(
                    f"the adapter of a model in {trained_on or 'memory'} cannot be loaded by others: push that first, "
                    "and train from its repository, or push the adapter afterwards with base_model"
                )
            base_model = base_model or trained_on
        self.hub_model_id, _ = check_repository(
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            config,
            base_model,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision,
            token=token or self.args.hub_token,
        )
        self.push_in_progress: PushInProgress | None = None

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        base_model: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Push the model, in place of [`~transformers.Trainer.push_to_hub`].

        Args:
            base_model (`str`, *optional*): the repository of an adapter's base model, if it was trained on a folder.
            kwargs: ignored. transformers fills its card with them; ours is made from the run's records.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token, private, base_model)
        self.save_model(_internal_call=True)
        self.save_state()
        return self.push_finished(commit_message, blocking, token, revision, private, base_model)

    def push_finished(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        base_model: str | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Push the model that is in the folder already. Arguments as for [`push_to_hub`]."""
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        push_model = functools.partial(
            push,
            self.args.output_dir,
            self.hub_model_id,
            base_model=base_model,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            token=token or self.args.hub_token,
        )
        return push_model() if blocking else run_as_future(push_model)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        if running is not None and running.is_done():
            running = None
        if running is not None and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.args.save_strategy == SaveStrategy.EPOCH:
            when = f"epoch {int(self.state.epoch)}"
        else:
            when = f"step {self.state.global_step}"
        # transformers may delete the checkpoint before it is sent
        scratch = tempfile.TemporaryDirectory(prefix=PUSH_PREFIX, dir=self.args.output_dir)
        copy = Path(scratch.name) / Path(checkpoint_folder).name
        try:
            fill_repository(Path(checkpoint_folder), copy)
        except (ValueError, OSError) as error:
            logger.warning(f"{copy.name} was not pushed: {error}")
            return
        job = run_as_future(self._push_copy, scratch, copy, f"Training in progress, {when}")
        if running is not None:
            running.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _push_copy(self, scratch: tempfile.TemporaryDirectory, copy: Path, commit_message: str) -> None:
        with scratch:
            try:
                push(
                    copy,
                    self.hub_model_id,
                    private=self.args.hub_private_repo,
                    revision=self.args.hub_revision,
                    commit_message=commit_message,
                    token=self.args.hub_token,
                )
            except (ValueError, OSError) as error:
                logger.warning(f"{copy.name} was not pushed: {error}")
