"""Arguments of VW-LMM's supervised fine-tuning: TRL's SFTConfig with the fields that the stages differ in."""

from dataclasses import dataclass

from trl import SFTConfig

from ..arguments import VWLmmArguments
from ..stages import PARTS, STAGES
from ..training_run import given_fields
from ..visual_word_loss import check_loss_fields


@dataclass
class VWLmmSFTConfig(VWLmmArguments, SFTConfig):
    """TRL's [`~trl.SFTConfig`], with fields of its own for what VW-LMM's stages differ in.

    TRL's `padding_free` and `packing` hold for samples with images too, and none is cut to fill a row.

    Args:
        stage (`str`, *optional*):
            One of the paper's four, `"align"`, `"instruct"`, `"visual_words"` and `"joint"`, or the one before them,
            `"read"`, in which words stand where images will, see [`ReadingCollator`]. It stands for the next four
            fields, see `STAGES`, where they are not given.
        trainable (`list[str]`, *optional*):
            Which parts train, of `"vision_tower"`, `"projector"`, `"language_model"` (its head included) and
            `"vm_head"`; the others are frozen. The model's own `requires_grad` if not given. With a `peft_config` the
            language model trains through its adapter, the others whole, as `modules_to_save`.
        visual_word_loss_weight (`float`, *optional*), visual_word_target (`str`, *optional*),
        detach_visual_words (`bool`, *optional*):
            Written into the model's config, see [`VWLmmConfig`]. Left as they are there if not given.
        assistant_only_loss (`bool`, *optional*):
            Whether `messages` are scored on what the assistant says alone, with any chat template that renders turns
            one after another. They are, if not given.
        projector_from_words (`bool`, *optional*, defaults to `False`):
            Whether the projector starts as a dictionary of the most frequent words of the training data, see
            [`start_projector`], whatever it was before. For a stage `"align"`.
        save_only_trained (`bool`, *optional*, defaults to `False`):
            Whether the parts that train are saved alone, as an adapter of the model that they were trained on. For
            stages that do not train the LLM. The folder loads as long as that model is where it was; `vwlmm merge`
            makes one model of both.
        skip_broken_images (`bool`, *optional*, defaults to `False`):
            Whether a sample whose image cannot be read is left out with a warning, and counted in the log as
            `skipped_samples`. It is an error otherwise.
        generation_eval_steps (`int`, *optional*):
            After how many steps, each time, the model answers questions of the evaluation data, see
            [`GenerationEval`]: the log then has `generation_accuracy` beside the losses. Never if not given.
        generation_eval_samples (`int`, *optional*, defaults to 64):
            How many questions, the same ones each time.
        generation_eval_max_new_tokens (`int`, *optional*, defaults to 64):
            The longest answer, in tokens.
    """

    def __post_init__(self):
        self.given_fields = given_fields(self)  # before defaults are worked out
        super().__post_init__()
        if isinstance(self.trainable, str):
            self.trainable = [self.trainable]
        if self.stage is not None and self.stage not in STAGES:
            raise ValueError(f'stage is "{self.stage}", expected one of {", ".join(STAGES)}')
        if self.trainable is not None and not (self.trainable and set(self.trainable) <= set(PARTS)):
            raise ValueError(f"trainable is {self.trainable}, expected one or more of {', '.join(PARTS)}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}, expected 1 or more, or null for rows of any length")
        if self.packing and self.max_length is None:
            raise ValueError("packing fills rows of max_length tokens, and max_length is null: give a number")
        for name in ("generation_eval_steps", "generation_eval_samples", "generation_eval_max_new_tokens"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} is {value!r}, expected 1 or more, a whole number")
        check_loss_fields(self.visual_word_loss_weight, self.visual_word_target)

    def check_amount(self, rows: int | None = None) -> None:
        """`ValueError` if nothing would train, which would end as if it had.

        Args:
            rows: of the training data, where they are known.
        """
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps}, expected 1 or more, or -1 for num_train_epochs")
        if self.max_steps < 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}, expected more than 0")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, expected 1 or more")
        batch = self.per_device_train_batch_size * max(self.n_gpu, 1) * self.world_size
        if rows is not None and self.dataloader_drop_last and rows < batch and not self.auto_find_batch_size:
            raise ValueError(
                f"dataloader_drop_last leaves no batch: the data have {rows} rows, expected at least {batch}, a batch "
                "on every device"
            )
