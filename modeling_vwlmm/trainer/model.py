"""The model that a trainer is given, made ready for its stage."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from transformers.modeling_utils import set_zero3_state
from transformers.utils import find_adapter_config_file
from trl.trainer.utils import create_model_from_path

from ..configuration_vwlmm import VWLmmConfig
from ..conversion.merge import merged_model
from ..data.load import columns_of
from ..data.reading import background_tokens, frequent_tokens
from ..files import reading
from ..known_fields import check_fields
from ..modeling_vwlmm import VWLmmForCausalLM
from ..stages import STAGES, missing_stage, stages_of, train_only, trained_parts
from ..training_run import FROM_THE_HUB
from ..weights import check_shards
from ..wrapped_weights import embedding_rows
from .lora import for_language_model, parts_alone, skip_small_parts
from .sft_config import VWLmmSFTConfig


def load_model(
    name: str, args: VWLmmSFTConfig, peft_config: PeftConfig | None = None, quantization_config: Any = None
) -> VWLmmForCausalLM:
    """The model of that name, loaded as TRL would, which looks for classes in transformers alone.

    An adapter becomes one model with its base. `args.model_init_kwargs` are used and removed.

    Raises:
        ValueError: an adapter of an adapter is asked for.
    """
    hub, model_init_kwargs = hub_arguments(args), dict(args.model_init_kwargs or {})
    args.model_init_kwargs = None
    if quantization_config is not None:
        model_init_kwargs["quantization_config"] = skip_small_parts(quantization_config)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        model_init_kwargs["device_map"] = None
    if args.deepspeed_plugin is not None:
        with set_zero3_state():  # which loads modules without weights, so that the shape must be known before
            VWLmmConfig.from_pretrained(name, **hub).image_feature_shape()
    if find_adapter_config_file(name, **hub) is not None:
        if peft_config is not None or args.save_only_trained or args.deepspeed_plugin is not None:
            raise ValueError(
                f"{name} is an adapter: to train what it makes of its base model, vwlmm merge {name} NEW_FOLDER"
            )
        model = merged_model(name, **{"dtype": "float32", **model_init_kwargs})
        model.config.name_or_path = name
        return model
    check_shards(name)
    check_fields(name, **hub)
    with reading(f"the model {name}"):
        model = create_model_from_path(name, VWLmmForCausalLM, **model_init_kwargs)
    if args.deepspeed_plugin is not None:
        model._weight_conversions = []  # loaded under ZeRO-3, it would be saved with stock LLaVA's names
    return model


def set_stage(
    model: VWLmmForCausalLM | PeftModel, args: VWLmmSFTConfig, peft_config: PeftConfig | None = None
) -> PeftConfig | None:
    """Freeze and unfreeze a model's parts, write the fields of the loss into its config, as a stage says.

    Returns:
        The `peft_config` for what trains, see [`for_language_model`].

    Raises:
        ValueError: `trainable` is given for a PEFT model, or names no LLM for an adapter to train.
    """
    base_model = model.get_base_model() if is_peft_model(model) else model
    fields = ("trainable", "visual_word_loss_weight", "visual_word_target", "detach_visual_words")
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    settings = {**STAGES.get(args.stage, {}), **given}
    for name in fields[1:]:
        if name in settings:
            setattr(base_model.config, name, settings[name])
    trainable = settings.get("trainable")
    if trainable == ["vm_head"] and not base_model.config.visual_word_loss_weight:
        raise ValueError("only the VM head trains, and visual_word_loss_weight 0 leaves out the one loss that it has")
    if args.save_only_trained:
        if peft_config is not None or is_peft_model(model):
            raise ValueError("save_only_trained is for whole parts: an adapter is saved alone already")
        if trainable is None or "language_model" in trainable:
            raise ValueError(f"save_only_trained is for stages that do not train the LLM, but {trainable} train")
        peft_config = parts_alone(trainable)
    elif peft_config is not None:
        peft_config = for_language_model(peft_config, trainable, base_model)
    elif is_peft_model(model):
        if args.trainable is not None:
            raise ValueError("trainable chooses whole parts of a model, but a PEFT model has been told what trains")
    elif trainable is not None:
        train_only(model, trainable)
    is_alone = args.save_only_trained and trainable == ["vm_head"] and not base_model.config.pseudo_image_features
    if trains_only_the_vm_head(base_model) or is_alone:
        # There is no graph to checkpoint, and checkpointing would make one: it asks for gradients of the inputs
        args.activation_checkpointing = args.gradient_checkpointing = False
    # FSDP fails on a class that the model lacks, and CLIP names those of its text tower
    classes = {type(module).__name__ for module in base_model.modules()}
    base_model._no_split_modules = set(base_model._no_split_modules) & classes
    return peft_config


def hub_arguments(args: VWLmmSFTConfig) -> dict[str, Any]:
    """What of `model_init_kwargs` holds for all files of a repository, not for the weights alone."""
    return {key: value for key, value in dict(args.model_init_kwargs or {}).items() if key in FROM_THE_HUB}


def check_adapter_config(name: str, model: VWLmmForCausalLM, **hub: Any) -> None:
    """`ValueError` if a model that an adapter trains differs from its base in what no adapter saves."""
    if not name:
        return
    own = VWLmmConfig.from_pretrained(name, **hub).pseudo_image_features
    if model.config.pseudo_image_features != own:
        raise ValueError(
            f"an adapter has no config of its own, and that of {name} has pseudo_image_features {own}: change it there"
        )


def trains_only_the_vm_head(model: VWLmmForCausalLM) -> bool:
    """Whether the VM head alone trains, so that the LLM needs no graph: not where it reads pseudo image features."""
    return trained_parts(model) == ["vm_head"] and not model.config.pseudo_image_features


def doubts_about(args: VWLmmSFTConfig, base_model: str, stages: list[dict], has_adapter: bool) -> list[str]:
    """What a recipe probably does not mean, a sentence each.

    Args:
        args: of the trainer.
        base_model: the name of the model that it starts from.
        stages: the record of the model and, last, of this run, see [`describe_run`].
        has_adapter: whether the model trains through an adapter, which says what trains.
    """
    *before, run = stages
    doubts = []
    if args.stage is None and args.trainable is None and not has_adapter:
        trained = ", ".join(run["trainable"])
        doubts.append(f"neither stage nor trainable is given, so that all of these train: {trained}")
    if missing := missing_stage(args.stage, before):
        doubts.append(
            f'stage "{args.stage}" comes after "{missing}", which {base_model} has not been through: its record has '
            f"{', '.join(stages_of(before))}"
        )
    if args.stage == "read" and "align" in stages_of(before):
        doubts.append(
            f'stage "read" comes before "align": it changes the LLM that the projector of {base_model} was trained for'
        )
    return doubts


@torch.no_grad()
def start_projector(model: VWLmmForCausalLM | PeftModel, args: VWLmmSFTConfig, processor: Any, dataset: Any) -> None:
    """Let the projector start as a dictionary, whose hidden units stand for the most frequent words of the data.

    Its output is at first the words for a background, which the LLM can read, see [`ReadingCollator`]. Each unit adds
    the embedding of its word to that: with E the embeddings, b their mean over the background's words and u(i) the
    word of unit i, the second layer's bias is b and the column i of its weight E_u(i) - b.

    Raises:
        ValueError: the projector does not train, is no two layers with biases, or its weights are elsewhere; the data
            are a stream or no `messages`, or the LLM has no token for their words.
    """
    trainable = args.trainable or STAGES.get(args.stage or "", {}).get("trainable", [])
    if is_peft_model(model) or "projector" not in trainable:
        raise ValueError("projector_from_words starts the projector anew, which has to be among the trainable parts")
    projector, text_config = model.model.multi_modal_projector, model.config.text_config
    bias = getattr(getattr(projector, "linear_2", None), "bias", None)
    if bias is None or bias.shape != (text_config.hidden_size,):
        raise ValueError("projector_from_words is for a projector of two layers with biases whose weights are at hand")
    if isinstance(dataset, IterableDataset) or "messages" not in columns_of(dataset):
        raise ValueError("projector_from_words counts the words of `messages`, and cannot count those of a stream")
    tokenizer = processor.tokenizer
    words = (row["messages"] for row in dataset.select_columns("messages"))
    tokens = frequent_tokens(words, tokenizer)[: projector.linear_2.in_features]
    embeddings = embedding_rows(model.get_input_embeddings(), text_config.vocab_size, bias.device)
    start = embeddings[background_tokens(tokenizer)].mean(0)
    projector.linear_1.weight.mul_(0.1)  # otherwise many words at once would be louder than the background
    bias.copy_(start)
    projector.linear_2.weight[:, : len(tokens)] = (embeddings[tokens] - start).t()
