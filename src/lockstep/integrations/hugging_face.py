"""A GPT of `task=language` as a folder that Hugging Face's transformers load as LlamaForCausalLM, and back.

With experts it is a MixtralForCausalLM, whose files have each expert's matrices by themselves: ours are cut up and put
together again.

Both compute the same: rotary positions turn the pairs (i, i + head_width / 2), norms are RMSNorms with ε = 1e-5, nothing
has a bias, embedding and output are not tied. So it is names that change, and no number.
Source: https://huggingface.co/docs/transformers/model_doc/llama, https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lockstep.checkpoint.weights import read_weights, safetensors
from lockstep.errors import UserError
from lockstep.models.gpt import GPT_SIZES, GPTConfig, gpt_config
from lockstep.tasks.language import window_length

LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.router": "block_sparse_moe.gate",
}
MIXTRAL_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}  # of an expert
OUR_NAMES = {theirs: ours for ours, theirs in LLAMA_NAMES.items()}
EPSILON = 1e-5  # of our RMSNorms
# What our GPT is: where a Llama's config says something else, its numbers would mean something else.
FIXED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": EPSILON,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
FIXED_MIXTRAL = FIXED | {"model_type": "mixtral", "sliding_window": None, "router_jitter_noise": 0.0}


def their_name(name: str) -> str:
    """`blocks.3.attention.query.weight` as transformers call it."""
    block, rest = re.match(r"(?:blocks\.(\d+)\.)?(.*)\.weight$", name).groups()  # type: ignore[union-attr]
    return f"{f'model.layers.{block}.' if block else ''}{LLAMA_NAMES[rest]}.weight"


def our_name(name: str) -> str:
    """The other way round.

    Raises:
        UserError: our GPT has no such tensor.
    """
    found = re.match(r"(?:model\.layers\.(\d+)\.)?(.*)\.weight$", name)
    if not found or found[2] not in OUR_NAMES:
        raise UserError(
            f"{name}: no tensor of a plain Llama, which task=language is; allowed are {', '.join(OUR_NAMES)}"
        )
    return f"{f'blocks.{found[1]}.' if found[1] else ''}{OUR_NAMES[found[2]]}.weight"


def to_theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors under transformers' names; those of experts [E, …] one by one."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        cut = re.match(r"blocks\.(\d+)\.mlp\.experts\.(\w+)$", name)
        if cut:
            place = f"model.layers.{cut[1]}.block_sparse_moe.experts"
            matrix = MIXTRAL_MATRICES[cut[2]]
            found |= {f"{place}.{expert}.{matrix}.weight": each.contiguous() for expert, each in enumerate(tensor)}
        else:
            found[their_name(name)] = tensor.contiguous()
    return found


def to_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round.

    Raises:
        UserError: our GPT has no such tensor.
    """
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    ours = {theirs: name for name, theirs in MIXTRAL_MATRICES.items()}
    for name, tensor in weights.items():
        cut = re.match(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight$", name)
        if cut:
            experts.setdefault(f"blocks.{cut[1]}.mlp.experts.{ours[cut[3]]}", {})[int(cut[2])] = tensor
        else:
            found[our_name(name)] = tensor
    return found | {name: torch.stack([each for _, each in sorted(parts.items())]) for name, parts in experts.items()}


def llama_config(config: GPTConfig, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json; `length` is the longest sequence that was trained on."""
    kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **FIXED}
    if config.experts:
        kind = {"architectures": ["MixtralForCausalLM"], **FIXED_MIXTRAL}
        kind |= {"num_local_experts": config.experts, "num_experts_per_tok": config.experts_per_token}
    return {
        **kind,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": length,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},  # as transformers 5 has it
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def export_llama(run: Path, folder: Path, weights: str = "model.pt") -> str:
    """Write a run's GPT to a new folder: config.json, model.safetensors and, if it has one, its tokenizer.json.

    Args:
        weights: the file in the run's folder: model.pt, or best.pt.

    Returns:
        A line that says what was written, and how to load it.

    Raises:
        UserError: it is no run of `task=language`, has no such file, or the folder is there already.
    """
    save_file = safetensors().save_file
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: is no run's folder, which has a config.yaml; name the folder that the run wrote to")
    task = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["task"]
    if task["name"] != "language":
        raise UserError(f"{run}: trained task={task['name']}; a Llama is what task=language trains")
    if not (run / weights).is_file():
        there = ", ".join(path.name for path in sorted(run.glob("*.pt"))) or "none: it has not finished"
        raise UserError(f"{run / weights}: no such file; files of weights there: {there}")
    if folder.exists():
        raise UserError(f"{folder}: is there already, and is not overwritten; name a new folder")
    experts, per_token = task.get("experts", 0), task.get("experts_per_token", 2)
    if experts and per_token == 1:
        raise UserError(
            f"{run}: trained task.experts_per_token=1, whose output is weighed by the router; a Mixtral weighs one expert by "
            "1, and would compute something else; allowed are 2 and more"
        )
    found = read_weights(run / weights)
    if any(name.endswith("mlp.bias") for name in found):
        raise UserError(
            f"{run}: trained balance=bias; a Mixtral's router has no biases, and would choose other experts"
        )
    config = gpt_config(task["size"], found["embedding.weight"].shape[0], kv_heads=task["kv_heads"])
    config = replace(config, experts=experts, experts_per_token=per_token)
    length = window_length(task["sequence_length"], task["data"])
    folder.mkdir(parents=True)
    save_file(to_theirs(found), folder / "model.safetensors")
    stated = llama_config(config, length, found["embedding.weight"].dtype)
    (folder / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
    if task["tokenizer"]:
        shutil.copyfile(task["tokenizer"], folder / "tokenizer.json")
    size = sum(tensor.numel() for tensor in found.values())
    return f"{folder}: {size:,} parameters; load it with {stated['architectures'][0]}.from_pretrained('{folder}')"


def import_llama(folder: Path, file: Path) -> str:
    """Write a Llama's weights to a new file that `resume=FILE` takes.

    Returns:
        A line with the words to train it by.

    Raises:
        UserError: it is another kind of model, of a shape that `task.size` has no name for, or the file is there.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json; name a folder as transformers' save_pretrained writes it")
    if file.exists():
        raise UserError(f"{file}: is there already, and is not overwritten; name a new file")
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = stated.get("rope_scaling") or stated.get("rope_parameters") or {}
    mixture = stated.get("model_type") == "mixtral"
    for name, ours in (FIXED_MIXTRAL if mixture else FIXED).items():
        if stated.get(name, ours) != ours:
            kind = "Mixtral" if mixture else "Llama"
            raise UserError(f"{folder}: {name} is {stated[name]}; task=language is a {kind} with {name} {ours}")
    if mixture and stated["num_experts_per_tok"] == 1:
        raise UserError(
            f"{folder}: num_experts_per_tok is 1; task=language weighs one expert otherwise; allowed is 2 up"
        )
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{folder}: its rotary positions are scaled ({rope}); those of task=language are not")
    heads = stated["num_attention_heads"]
    shape = (stated["num_hidden_layers"], stated["hidden_size"], heads, stated["intermediate_size"])
    shapes = {(each.layers, each.width, each.heads, each.hidden): name for name, each in GPT_SIZES.items()}
    if shape not in shapes or rope.get("rope_theta", stated.get("rope_theta", 10_000.0)) != 10_000.0:
        known = ", ".join(f"{name} {each}" for each, name in shapes.items())
        raise UserError(
            f"{folder}: layers, width, heads, hidden are {shape}; task.size has names for {known}, all with rope_theta 10000"
        )
    load_file = safetensors().load_file
    index = folder / "model.safetensors.index.json"
    parts = (
        sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if index.is_file()
        else ["model.safetensors"]
    )
    found: dict[str, Tensor] = {}
    for part in parts:
        if not (folder / part).is_file():
            raise UserError(f"{folder / part}: no such file; weights are read from safetensors")
        found |= load_file(folder / part)
    found = to_ours(found)
    torch.save(found, file)
    words = f"task=language task.size={shapes[shape]} task.kv_heads={stated.get('num_key_value_heads', heads)}"
    if mixture:
        words += f" task.experts={stated['num_local_experts']} task.experts_per_token={stated['num_experts_per_tok']}"
    return (
        f"{file}: {sum(tensor.numel() for tensor in found.values()):,} parameters; train it with resume={file} {words}"
    )
