"""What the package uses of torch, transformers, TRL, PEFT or accelerate that an upgrade may remove unannounced."""

import ast
import functools
import importlib
import inspect
import re
import sys

from helpers.source import FILES, PACKAGE, TREES, imports_of


# A name, with a parameter in parentheses, and what for. Add a line where `test_all_of_them_are_listed` asks for it
NAMES = {
    # torch
    "torch._C._autograd._get_current_graph_task_keep_graph": "gradients are overwritten only if the graph is freed",
    # transformers: models
    "transformers.PreTrainedConfig._attn_implementation": "torch's attention is replaced with its own by samples",
    "transformers.PreTrainedModel._init_weights": "new projectors and VM heads start as a model's own layers do",
    "transformers.PreTrainedModel._no_split_modules": "FSDP wraps these layers, of which CLIP names some it has not",
    "transformers.PreTrainedModel._adjust_missing_and_unexpected_keys": "a model without a head loads one that has it",
    "transformers.core_model_loading._weight_conversions": "under ZeRO-3, weights would be saved under old names",
    "transformers.activations.ACT2FN": "the projector's activation, by its name in the config",
    "transformers.image_processing_utils.BaseImageProcessor": "tells a processor of images from one of text",
    "transformers.image_utils.OPENAI_CLIP_MEAN": "the mean colour of published checkpoints",
    "transformers.image_utils.OPENAI_CLIP_STD": "the deviation of colours of published checkpoints",
    "transformers.modeling_utils.set_zero3_state": "a model is loaded under ZeRO-3 as TRL does",
    "transformers.modeling_utils.str_to_torch_dtype": "the dtypes that safetensors names",
    "transformers.utils.find_adapter_config_file": "tells an adapter from a model",
    "transformers.modeling_outputs.BaseModelOutputWithPast": "our outputs add the image mask to it",
    "transformers.modeling_outputs.BaseModelOutputWithPooling": "our outputs add the projected features to it",
    "transformers.modeling_outputs.CausalLMOutputWithPast": "our outputs add the two losses to it",
    "transformers.processing_utils.Unpack": "what else forward takes, which callers look up in its signature",
    "transformers.utils.TransformersKwargs": "what else forward takes, which callers look up in its signature",
    "transformers.utils.can_return_tuple": "as LLaVA's forward",
    "transformers.utils.torch_compilable_check": "placeholders are counted under torch.compile too",
    # transformers: generation
    "transformers.generation.GenerationMixin._get_candidate_generator": "proposals are made without the image token",
    "transformers.generation.GenerationMixin._get_logits_processor": "scores have a place for the image token",
    "transformers.generation.GenerationMixin._supports_mm_encoder_outputs": "under FSDP images are read in forward",
    "transformers.generation.AssistedCandidateGenerator": "an assistant may know no image token",
    "transformers.generation.PromptLookupCandidateGenerator": "the prompt has tokens that are never predicted",
    # transformers: checkpoints
    "transformers.conversion_mapping.get_model_conversion_mapping": "LLaVA's names of weights, old ones among them",
    "transformers.core_model_loading.WeightConverter": "a renaming that changes tensors too, which is refused",
    "transformers.core_model_loading.WeightRenaming": "a renaming of weights",
    "transformers.core_model_loading.rename_source_key": "applies renamings to a name",
    "transformers.dynamic_module_utils.custom_object_save": "the model's code goes to the Hub beside it",
    "transformers.integrations.deepspeed.is_deepspeed_zero3_enabled": "tells whether weights are loaded in parts",
    "transformers.utils.ADAPTER_CONFIG_NAME": "the name of a file",
    "transformers.utils.ADAPTER_SAFE_WEIGHTS_NAME": "the name of a file",
    "transformers.utils.CONFIG_NAME": "the name of a file",
    "transformers.utils.SAFE_WEIGHTS_INDEX_NAME": "the name of a file",
    "transformers.utils.SAFE_WEIGHTS_NAME": "the name of a file",
    "transformers.utils.WEIGHTS_INDEX_NAME": "the name of a file",
    "transformers.utils.WEIGHTS_NAME": "the name of a file",
    "transformers.convert_slow_tokenizer.bytes_to_unicode": "tokens that are no whole characters are shown as bytes",
    # transformers: the server
    "transformers.exporters.AutoHfExporter": "writes graphs of ONNX and OpenVINO",
    "transformers.exporters.ExportedModel": "keeps the graphs of a model in one folder",
    "transformers.exporters.OnnxConfig": "how graphs of ONNX are written",
    "transformers.exporters.OpenVINOConfig": "how graphs of OpenVINO are written",
    "transformers.cli.serving.chat_completion.ChatCompletionHandler": "answers requests of OpenAI's chat API",
    "transformers.cli.serving.model_manager.ModelManager": "hands it the one model",
    "transformers.cli.serving.utils.GenerationState": "requests wait for each other",
    "transformers.cli.serving.utils.Modality": "the model reads images",
    # transformers: templates
    "transformers.utils.chat_template_utils.render_jinja_template": "says where the assistant speaks",
    # transformers: the trainer
    "transformers.Trainer._finish_current_push": "the last push waits for those that run in the background",
    "transformers.Trainer._get_eval_sampler": "samples are evaluated in order, also where training groups them",
    "transformers.Trainer._get_train_sampler": "samples are grouped by our count of their tokens",
    "transformers.Trainer._remove_unused_columns": "packed rows have the columns that others have",
    "transformers.trainer_pt_utils.LengthGroupedSampler": "samples of about the same length share a batch",
    "transformers.Trainer._get_grad_norm": "a gradient that is not finite is refused before the step",
    "transformers.Trainer._get_output_dir": "a checkpoint is written elsewhere until it is whole",
    "transformers.Trainer._inner_training_loop": "a second try with a smaller batch has a log of its own",
    "transformers.Trainer._push_from_checkpoint": "our push in place of theirs, of checkpoints that are whole",
    "transformers.Trainer._run_epoch": "a run that is finished takes no further step",
    "transformers.Trainer._save": "the record of the run is saved with the model",
    "transformers.Trainer._save_checkpoint": "a checkpoint appears when it is whole",
    "transformers.Trainer._set_signature_columns_if_needed": "the columns that name a sample are kept",
    "transformers.Trainer._signature_columns": "the columns that name a sample are kept",
    "transformers.Trainer.save_model(_internal_call)": "tells our own saving from a caller's",
    "transformers.trainer.TRAINER_STATE_NAME": "the name of a file",
    "transformers.trainer_callback.TrainerState": "tells whether a run is finished",
    "transformers.trainer_utils.HubStrategy": "which checkpoints are pushed",
    "transformers.trainer_utils.SaveStrategy": "whether checkpoints are named after steps or epochs",
    "transformers.trainer_utils.get_last_checkpoint": "where a run goes on",
    "transformers.trainer_utils.rotate_checkpoints": "old checkpoints go when the new one is whole",
    "transformers.utils.PushInProgress": "the pushes that run in the background",
    # TRL
    "trl.SFTTrainer._metrics": "our two losses stand in TRL's log",
    "trl.SFTTrainer._name": "what a trainer calls itself in its card",
    "trl.SFTTrainer._total_train_tokens": "a second try with a smaller batch counts its own tokens",
    "trl.SFTTrainer._tag_names": "the tags of its card",
    "trl.chat_template_utils.get_training_chat_template": "a known template with the assistant's turns marked",
    "trl.chat_template_utils.has_generation_markers": "whether a template marks the assistant's turns",
    "trl.data_utils.apply_chat_template": "prompts with completions are rendered as TRL does",
    "trl.data_utils.is_conversational": "tells conversations from text",
    "trl.data_utils.prepare_multimodal_messages": "images take their places in messages",
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling": "rows without padding are laid out as TRL does",
    "trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling": "our collator but for labels and long rows",
    "trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling._collate_language_modeling": "messages are ours",
    "trl.trainer.utils.FusedCausalLMOutput": "our loss goes out beside TRL's",
    "trl.trainer.utils.create_model_from_path": "a model given by its name is loaded as TRL does",
    "trl.trainer.utils.maybe_gather_lm_head_ctx": "under ZeRO-3 the heads are gathered as TRL does",
    "trl.scripts.utils.DatasetConfig": "an entry of a mixture, to which ours adds a folder of images",
    # datasets
    "datasets.Dataset._indices": "columns are added below the order of a shuffled dataset, which is not written anew",
    "datasets.ArrowBasedBuilder._generate_tables": "what a builder of one's own makes",
    "datasets.ArrowBasedBuilder._info": "the columns of it",
    "datasets.ArrowBasedBuilder._split_generators": "the splits of it",
    "datasets.IterableDataset._resolve_features": "the columns of a stream whose files do not say them",
    # PEFT
    "peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": "what it adapts in an LLM",
    "peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING": "what it adapts in an LLM",
    "peft.utils.constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING": "what it adapts in an LLM",
    "peft.utils.constants.DUMMY_TARGET_MODULES": "an adapter that trains whole parts and adapts no layer",
    "peft.utils.ModulesToSaveWrapper": "what trains whole beside an adapter, kept in float32",
}  # fmt: skip

LIBRARIES = {"torch", "transformers", "trl", "peft", "accelerate"}
# The rest of the five is internal
DOCUMENTED = LIBRARIES | {"torch.nn", "torch.distributed.fsdp", "transformers.utils.logging", "accelerate.utils"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def source_of(cls):
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # written in C
        return ""


@functools.cache
def library_classes():
    """Those that the package's classes inherit from."""
    for module in FILES:
        if not module.endswith(("__main__", "evaluation.lmms")):  # the latter needs lmms-eval
            importlib.import_module(module)
    own = {
        value
        for module in FILES.keys() & sys.modules.keys()
        for value in vars(sys.modules[module]).values()
        if inspect.isclass(value) and value.__module__.partition(".")[0] == PACKAGE.name
    }
    bases = {base for cls in own for base in cls.__mro__ if base not in own and base is not object}
    return {base: source_of(base) for base in bases}


def is_of_a_library(name):
    return any(
        name in vars(cls) or re.search(rf"\bself\.{name}\b", source) for cls, source in library_classes().items()
    )


def is_there(name):
    """Whether a name can be imported, or is an attribute that its class, or a module of it, sets."""
    path, _, parameter = name.rstrip(")").partition("(")
    parts, found = path.split("."), None
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
            break
        except ImportError:
            continue
    for part in parts[i:]:
        if not hasattr(found, part):
            modules = {inspect.getmodule(cls) for cls in getattr(found, "__mro__", (found,))} - {None}
            return any(re.search(rf"\.{part}\b", source_of(module)) for module in modules)
        found = getattr(found, part)
    return not parameter or parameter in inspect.signature(found).parameters


def test_all_of_them_are_there():
    gone = [f"{name} ({reason})" for name, reason in NAMES.items() if not is_there(name)]
    assert not gone, "the libraries have removed " + "; ".join(gone)


def used_in(module):
    """Private names that a module reads, sets or gives, and what it imports that is internal to the five libraries."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            yield node.attr, is_private(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, is_private(node.arg)
        elif isinstance(node, ast.ClassDef):
            for name in names_of(node.body):
                yield name, is_private(name) and is_of_a_library(name)
    for source, name in imports_of(module):
        path = source if name is None else f"{source}.{name}"
        if path.partition(".")[0] != PACKAGE.name:
            is_internal = path.partition(".")[0] in LIBRARIES and not {source, path} & DOCUMENTED
            yield path, is_internal or any(map(is_private, path.split(".")))


def names_of(body):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                yield target.id


@functools.cache
def defined_here():
    """What the package defines: functions, classes, what stands in the body of a class, attributes of `self`."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
            found |= set(names_of(getattr(node, "body", []) if isinstance(node, (ast.Module, ast.ClassDef)) else []))
    return found


def used():
    """name -> the modules of the package that use it."""
    found = {}
    for module in FILES:
        for name, is_private_or_internal in used_in(module):
            if is_private_or_internal and (name not in defined_here() or is_of_a_library(name)):
                found.setdefault(name, set()).add(module)
    return found


def test_all_of_them_are_listed():
    listed = {part for name in NAMES for part in re.split(r"[.()]", name) if is_private(part)} | NAMES.keys()
    missing = [f"{name} (in {', '.join(sorted(modules))})" for name, modules in used().items() if name not in listed]
    assert not missing, "private or internal, and not in NAMES with a reason: " + "; ".join(missing)


def test_none_of_them_is_listed_in_vain():
    names = used().keys()
    unused = [name for name in NAMES if not {name, re.split(r"[.(]", name.rstrip(")"))[-1]} & names]
    assert not unused, "in NAMES, and used nowhere: " + "; ".join(unused)
