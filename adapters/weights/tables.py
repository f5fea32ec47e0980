"""Name tables between the hub and Megatron-like programs, as data, and the two ways through them.

{i} is a layer, {e} an expert. Sources: Pai-Megatron-Patch's synchronizers and mbridge for Megatron-Core, MindSpeed-MM's
checkpoint/vlm_model/converters for MindSpeed-MM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlcore.errors import ConfigError
from rlcore.weights.architecture import Architecture
from rlcore.weights.tensors import Spec, Weights, derived, few, spec_of

from .layouts import GateUp, GroupedQKV, Layout, PerHeadQKV, Same

ROWS, COLUMNS, WHOLE, GATE_UP = Same(0), Same(1), Same(), GateUp()  # how ranks of tensor parallelism share a tensor


@dataclass(frozen=True)
class Rule:
    """The hub's names of the tensors that make one of the other program's."""

    hub: tuple[str, ...]
    other: str
    layout: Layout = WHOLE

    def at(self, layer: int | None = None, expert: int | None = None) -> Rule:
        def named(text: str) -> str:
            return text.replace("{i}", str(layer)).replace("{e}", str(expert))

        return replace(self, hub=tuple(map(named, self.hub)), other=named(self.other))


def decoder_rules(config: Any, norms: tuple[str, str], prefix: str = "") -> list[Rule]:
    """A text model: Llama, Qwen2, Qwen3, and Qwen3-MoE with an expert's number where Megatron-Core's grouped GEMM has none.

    `norms`: the other program's names of a layer's two norms.
    """
    groups = config.num_key_value_heads
    qkv = GroupedQKV(0, groups, config.num_attention_heads // groups)
    head, layer, attention = "model.", "model.layers.{i}.", "decoder.layers.{i}.self_attention."
    mlp, moe = "decoder.layers.{i}.mlp.", "decoder.layers.{i}.mlp.experts.{e}."
    projections = tuple(f"{layer}self_attn.{name}_proj" for name in "qkv")
    rules = [
        Rule((f"{head}embed_tokens.weight",), "embedding.word_embeddings.weight", ROWS),
        Rule((f"{layer}input_layernorm.weight",), f"decoder.layers.{{i}}.{norms[0]}"),
        Rule(tuple(f"{name}.weight" for name in projections), f"{attention}linear_qkv.weight", qkv),
        Rule(tuple(f"{name}.bias" for name in projections), f"{attention}linear_qkv.bias", qkv),
        Rule((f"{layer}self_attn.q_norm.weight",), f"{attention}q_layernorm.weight"),
        Rule((f"{layer}self_attn.k_norm.weight",), f"{attention}k_layernorm.weight"),
        Rule((f"{layer}self_attn.o_proj.weight",), f"{attention}linear_proj.weight", COLUMNS),
        Rule((f"{layer}post_attention_layernorm.weight",), f"decoder.layers.{{i}}.{norms[1]}"),
        Rule((f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"), f"{mlp}linear_fc1.weight", GATE_UP),
        Rule((f"{layer}mlp.down_proj.weight",), f"{mlp}linear_fc2.weight", COLUMNS),
        Rule((f"{layer}mlp.gate.weight",), f"{mlp}router.weight"),
        Rule(
            (f"{layer}mlp.experts.{{e}}.gate_proj.weight", f"{layer}mlp.experts.{{e}}.up_proj.weight"),
            f"{moe}linear_fc1.weight", GATE_UP,
        ),
        Rule((f"{layer}mlp.experts.{{e}}.down_proj.weight",), f"{moe}linear_fc2.weight", COLUMNS),
        Rule((f"{head}norm.weight",), "decoder.final_layernorm.weight"),
        Rule(("lm_head.weight",), "output_layer.weight", ROWS),
    ]  # fmt: skip
    return [replace(rule, other=prefix + rule.other) for rule in rules]


def tower_rules(config: Any, layers: str, norms: tuple[str, str], outside: Mapping[str, str]) -> list[Rule]:
    """The vision tower of Qwen2.5-VL. `layers`: the other program's prefix of layer {i}; `outside`: its names of patch_embed,
    and the merger's norm and projection."""
    block, heads = "visual.blocks.{i}.", config.num_heads
    rules = [
        Rule(("visual.patch_embed.proj.weight",), outside["patches"]),
        Rule((f"{block}norm1.weight",), f"{layers}{norms[0]}"),
        Rule((f"{block}norm2.weight",), f"{layers}{norms[1]}"),
        Rule((f"{block}attn.proj.weight",), f"{layers}self_attention.linear_proj.weight", COLUMNS),
        Rule((f"{block}attn.proj.bias",), f"{layers}self_attention.linear_proj.bias"),
        Rule((f"{block}mlp.down_proj.weight",), f"{layers}mlp.linear_fc2.weight", COLUMNS),
        Rule((f"{block}mlp.down_proj.bias",), f"{layers}mlp.linear_fc2.bias"),
        Rule(("visual.merger.ln_q.weight",), outside["norm"]),
        Rule(("visual.merger.mlp.0.weight",), f"{outside['projection']}linear_fc1.weight", ROWS),
        Rule(("visual.merger.mlp.0.bias",), f"{outside['projection']}linear_fc1.bias", ROWS),
        Rule(("visual.merger.mlp.2.weight",), f"{outside['projection']}linear_fc2.weight", COLUMNS),
        Rule(("visual.merger.mlp.2.bias",), f"{outside['projection']}linear_fc2.bias"),
    ]
    for kind in ("weight", "bias"):
        qkv, gate_up = (f"{block}attn.qkv.{kind}",), (f"{block}mlp.gate_proj.{kind}", f"{block}mlp.up_proj.{kind}")
        rules.append(Rule(qkv, f"{layers}self_attention.linear_qkv.{kind}", PerHeadQKV(0, heads, 1)))
        rules.append(Rule(gate_up, f"{layers}mlp.linear_fc1.{kind}", GATE_UP))
    return rules


def applied(rules: Iterable[Rule], names: Iterable[str], where: str) -> list[Rule]:
    """The rules for just these of the hub's tensors, one for each tensor of the other program, in the table's order by layer.

    ConfigError for tensors that no rule covers, or only with others that are not there.
    """
    listed = list(names)
    there, found = set(listed), dict[str, Rule]()
    patterns = [(rule, _pattern(rule.hub[0])) for rule in rules]
    for name in listed:
        for rule, pattern in patterns:
            if match := pattern.fullmatch(name):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                one = rule.at(**numbers)
                found[one.other] = one
    covered = {name for rule in found.values() for name in rule.hub}
    if wrong := sorted((there - covered) | (covered - there)):
        known = "it has Llama, Qwen2, Qwen3, Qwen3-MoE and Qwen2.5-VL"
        raise ConfigError(f"{where}: {len(wrong)} tensors are not in the table of names: {few(wrong)}; {known}")
    order = {rule.other: number for number, rule in enumerate(rules)}
    return sorted(found.values(), key=partial(_place, order))


def _place(order: Mapping[str, int], rule: Rule) -> tuple[int, ...]:
    """By layer, then in the table's order, then by expert; what is in no layer goes first."""
    layer = re.search(r"layers\.(\d+)\.", rule.other)
    expert = re.search(r"experts\.(\d+)\.", rule.other)
    pattern = re.sub(r"experts\.\d+\.", "experts.{e}.", re.sub(r"layers\.\d+\.", "layers.{i}.", rule.other))
    return int(layer[1]) if layer else -1, order[pattern], int(expert[1]) if expert else 0


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{i\}", r"(?P<layer>\d+)").replace(r"\{e\}", r"(?P<expert>\d+)"))


def joined_tensor(rule: Rule, weights: Weights) -> Tensor:
    """The other program's tensor, whole."""
    return rule.layout.join([weights.read(name) for name in rule.hub]).contiguous()


def joined_by(rules: Sequence[Rule], weights: Weights) -> Weights:
    """The other program's tensors, whole, of the hub's `weights`."""
    known = {rule.other: rule for rule in rules}
    specs = {name: spec_of(rule.layout.join([weights.specs[hub].meta() for hub in rule.hub])) for name, rule in known.items()}
    return Weights(specs, lambda name: joined_tensor(known[name], weights))


def layout_of(rules: Iterable[Rule], name: str) -> Layout | None:
    """The layout of one of the other program's tensors; None for a name that is not in the table."""
    return next((rule.layout for rule in rules if _pattern(rule.other).fullmatch(name)), None)


def by_hub(rules: Sequence[Rule], others: Weights, model: Architecture, where: str) -> Weights:
    """The other program's whole tensors under the hub's names; what no rule names keeps its name, to be reported. ConfigError
    for tensors of another shape than the model's."""
    known = {rule.other: rule for rule in rules}
    wanted = {name: _joined_spec(rule, model).shape for name, rule in known.items() if name in others.specs}
    if wrong := [name for name, shape in wanted.items() if others.specs[name].shape != shape]:
        found = [f"{name} is {list(others.specs[name].shape)}, not {list(wanted[name])}" for name in wrong]
        said = f"{len(wrong)} tensors have other shapes than {model.folder / 'config.json'} says"
        raise ConfigError(f"{where}: {said}: {few(found)}")

    def make(name: str, whole: Tensor) -> Mapping[str, Tensor]:
        if name not in known:
            return {name: whole}
        return dict(zip(known[name].hub, known[name].layout.split(whole), strict=True))

    return derived(others, make)[0]


def _joined_spec(rule: Rule, model: Architecture) -> Spec:
    parts = [Spec(model.expected[name], torch.float32).meta() for name in rule.hub]
    return spec_of(rule.layout.join(parts))


def cut_rows(weights: Weights, rows: Mapping[str, int]) -> Weights:
    """Without the rows that pad a vocabulary: `rows` are the true ones of these tensors."""
    longer = {name: count for name, count in rows.items() if name in weights.specs and weights.specs[name].shape[0] > count}
    specs = {name: _shortened(spec, longer[name]) if name in longer else spec for name, spec in weights.specs.items()}

    def read(name: str) -> Tensor:
        return weights.read(name)[: longer[name]].contiguous() if name in longer else weights.read(name)

    return Weights(specs, read)


def _shortened(spec: Spec, rows: int) -> Spec:
    return replace(spec, shape=(rows, *spec.shape[1:]))

