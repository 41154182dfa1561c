"""What a trainer pushes to the Hub, and when."""

import tempfile
from pathlib import Path

from accelerate.utils import is_peft_model
from huggingface_hub import run_as_future
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from ..hub.push import check_repository, push
from ..hub.repository import fill_repository


logger = logging.get_logger(__name__)


class HubMixin:
    """Lets a [`~transformers.Trainer`] push through [`~modeling_vwlmm.hub.push`], during training and after it.

    Pushes during training run in the background, of a checkpoint as it was written; one that fails is a warning.
    """

    def init_hf_repo(self, token=None, private=None, base_model=None):
        """See that the repository can be pushed to; the first push makes it, when the model has been seen to load.

        Raises:
            ValueError: there is another model, or what is asked for would upload what does not belong there.
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
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message="End of training",
        blocking=True,
        token=None,
        revision=None,
        private=None,
        base_model=None,
        **kwargs,
    ):
        """As [`~transformers.Trainer.push_to_hub`], through [`~modeling_vwlmm.hub.push`].

        Args:
            base_model (`str`, *optional*): the repository of an adapter's base model, if it was trained on a folder.
            kwargs: taken and not used; the card is made from the run's own records.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token, private, base_model)
        self.save_model(_internal_call=True)
        self.save_state()
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        arguments = {
            "base_model": base_model,
            "private": private,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
            "token": token,
        }
        if blocking:
            return push(self.args.output_dir, self.hub_model_id, **arguments)
        return run_as_future(push, self.args.output_dir, self.hub_model_id, **arguments)

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.args.save_strategy == SaveStrategy.EPOCH:
            when = f"epoch {int(self.state.epoch)}"
        else:
            when = f"step {self.state.global_step}"
        # The checkpoint may be deleted before it is sent
        scratch = tempfile.TemporaryDirectory(prefix=".push-", dir=self.args.output_dir)
        copy = Path(scratch.name) / Path(checkpoint_folder).name
        try:
            fill_repository(Path(checkpoint_folder), copy)
        except (ValueError, OSError) as error:
            logger.warning(f"{copy.name} was not pushed: {error}")
            return
        job = run_as_future(self._push_copy, scratch, copy, f"Training in progress, {when}")
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _push_copy(self, scratch, copy, commit_message):
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
