"""Real megatron-core on CPU: load converted checkpoints at several parallel sizes, run them, save them again.

PORT RANK WORK JOB... ; a job is NAME=BASE=TP=PP=EP: loads WORK/NAME, saves WORK/NAME-tpX-ppY-epZ. Prints a JSON line for each.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from rlcore import registry

CPU = registry.load("backends", "cpu")
CPU(CPU.Options()).prepare()

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: E402

HOST = torch.device("cpu")


def on_cpu() -> None:
    """Megatron asks CUDA for its device, random states and streams."""
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe
    import torch.distributed as dist

    torch.cuda.current_device = lambda: HOST
    torch.cuda.synchronize = lambda *_: None
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.Tensor.cuda = lambda self, *_, **__: self
    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    moe.te_general_gemm = None
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    dispatcher.maybe_move_tensor_to_cpu = lambda t, as_numpy=False, **_: t.numpy() if as_numpy and torch.is_tensor(t) else t
    exchange = dist.all_to_all_single

    def all_to_all(output, given, output_split_sizes=None, input_split_sizes=None, group=None, **more):
        sizes = (one.tolist() if torch.is_tensor(one) else one for one in (output_split_sizes, input_split_sizes))
        return exchange(output, given, *sizes, group=group, **more)

    dist.all_to_all_single = all_to_all
    nothing = {"__init__": lambda *_: None, "record_event": lambda self, *_: self, "synchronize": lambda *_: None}
    torch.cuda.Stream = type("Stream", (), nothing | {"wait_stream": lambda *_: None})
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.current_stream = lambda *_: torch.cuda.Stream()


def config_of(text, tensor: int, pipeline: int, expert: int, **more):
    from megatron.core.transformer import TransformerConfig

    experts = getattr(text, "num_experts", None)
    mixture = {
        "num_moe_experts": experts, "moe_router_topk": text.num_experts_per_tok,
        "moe_ffn_hidden_size": text.moe_intermediate_size, "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": False, "moe_router_dtype": "fp32",
    } if experts else {}  # fmt: skip
    return TransformerConfig(**{
        "num_layers": text.num_hidden_layers, "hidden_size": text.hidden_size, "num_attention_heads": text.num_attention_heads,
        "num_query_groups": text.num_key_value_heads, "kv_channels": getattr(text, "head_dim", None),
        "ffn_hidden_size": text.intermediate_size, "qk_layernorm": text.model_type.startswith("qwen3"),
        "add_qkv_bias": text.model_type.startswith("qwen2"), "add_bias_linear": False, "layernorm_epsilon": text.rms_norm_eps,
        "tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "expert_model_parallel_size": expert,
        "pipeline_dtype": torch.float32, "expert_tensor_parallel_size": 1 if experts else None,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm", "use_cpu_initialization": True, "masked_softmax_fusion": False, "persist_layer_norm": False,
        "bias_activation_fusion": False, "bias_dropout_fusion": False, "gradient_accumulation_fusion": False, **mixture, **more,
    })  # fmt: skip


def language(text, tied: bool, *sizes: int):
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = config_of(text, *sizes)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    padded = (text.vocab_size + 127) // 128 * 128
    return GPTModel(
        config, spec, padded, 2048, position_embedding_type="rope", share_embeddings_and_output_weights=tied,
        rotary_base=text.rope_parameters["rope_theta"], pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip


class VisionLanguage(torch.nn.Module):
    """The modules of Pai-Megatron-Patch's Qwen2.5-VL that hold weights, under its names."""

    def __init__(self, config, *sizes: int) -> None:
        super().__init__()
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_mlp_module_spec
        from megatron.core.transformer.mlp import MLP
        from megatron.core.transformer.transformer_block import TransformerBlock

        vision = config.vision_config
        shape = SimpleNamespace(
            num_hidden_layers=vision.depth, hidden_size=vision.hidden_size, num_attention_heads=vision.num_heads,
            num_key_value_heads=vision.num_heads, head_dim=vision.hidden_size // vision.num_heads,
            intermediate_size=vision.intermediate_size, model_type="vision", rms_norm_eps=1e-6,
        )  # fmt: skip
        tower = config_of(shape, *sizes, add_qkv_bias=True, add_bias_linear=True)
        merged = vision.hidden_size * vision.spatial_merge_size**2
        projection = config_of(
            shape, *sizes, add_bias_linear=True, gated_linear_unit=False, hidden_size=vision.out_hidden_size,
            ffn_hidden_size=merged, activation_func=torch.nn.functional.gelu,
        )  # fmt: skip
        self.language_model = language(config.get_text_config(), config.tie_word_embeddings, *sizes)
        self.vision_model = torch.nn.Module()
        patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.vision_model.patch_embed = torch.nn.Module()
        self.vision_model.patch_embed.proj = torch.nn.Conv3d(3, vision.hidden_size, patch, patch, bias=False)
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        self.vision_model.decoder = TransformerBlock(tower, spec, post_layer_norm=True, pre_process=True, post_process=True)
        self.vision_model.projection = torch.nn.Module()
        submodules = get_mlp_module_spec(use_te=False).submodules
        self.vision_model.projection.encoder = MLP(projection, submodules, input_size=merged)

    def sharded_state_dict(self):
        from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

        groups = ensure_metadata_has_dp_cp_group(None)
        states = {**self.language_model.sharded_state_dict("language_model.")}
        states |= self.vision_model.decoder.sharded_state_dict("vision_model.decoder.")
        states |= self.vision_model.projection.encoder.sharded_state_dict("vision_model.projection.encoder.", (), groups)
        own = self.vision_model.patch_embed.state_dict(prefix="", keep_vars=True)
        return states | make_sharded_tensors_for_checkpoint(own, "vision_model.patch_embed.")


def error(model, base: Path, config) -> float:
    """Largest difference of log-probabilities, of every token after every prefix of a text, from transformers'."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    vision = hasattr(config, "vision_config")
    plain = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(base, dtype=torch.float32)
    rows = config.get_text_config().vocab_size
    ids = torch.randint(0, rows, (2, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(16)[None].expand(2, -1).contiguous()
    mask = ~torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    with torch.no_grad():
        logits = gather_from_tensor_model_parallel_region((model.language_model if vision else model)(ids, positions, mask))
        text = difference(logits[..., :rows].log_softmax(-1), plain(input_ids=ids).logits.log_softmax(-1))
        return max(text, tower_error(model.vision_model, plain.model.visual)) if vision else text


def tower_error(tower, plain) -> float:
    """Largest difference of an image's embeddings from transformers' tower, relative to their size. Megatron-Core has no such
    tower of its own: order of patches, windows and rotary angles are taken from transformers, the layers are Megatron's."""
    config, inputs, windows = plain.config, [], []
    grid, shape = torch.tensor([[1, 12, 20]]), (240, 3, config.temporal_patch_size, config.patch_size, config.patch_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    hooks = [plain.merger.register_forward_hook(lambda _, __, output: inputs.append(output))]
    for block in plain.blocks:
        hooks.append(block.register_forward_pre_hook(lambda _, given, more: windows.append((given, more)), with_kwargs=True))
    plain(pixels.flatten(1), grid)
    for hook in hooks:
        hook.remove()
    (expected,) = inputs
    patches = tower.patch_embed.proj(pixels).flatten(1)
    assert difference(patches, plain.patch_embed(pixels.flatten(1))) < 1e-5
    hidden = windows[0][0][0][:, None]  # those patches by window: [patches, 1, hidden]
    for layer, (_, given) in zip(tower.decoder.layers, windows, strict=True):
        cosine, sine = given["position_embeddings"]
        window = torch.bucketize(torch.arange(len(hidden)), given["cu_seqlens"], right=True)
        angles = torch.atan2(sine, cosine)[:, None, None]
        hidden, _ = layer(hidden, attention_mask=(window[:, None] != window)[None, None], rotary_pos_emb=angles)
    assert len({len(given["cu_seqlens"]) for _, given in windows}) == 2, "layers with windows, and without"
    output, bias = tower.projection.encoder(tower.decoder.final_layernorm(hidden).flatten().view(len(expected), -1))
    return difference(output + bias, expected) / float(expected.abs().max())


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def job(work: Path, words: str) -> dict[str, object]:
    import megatron.core.dist_checkpointing as checkpointing
    import torch.distributed as dist
    from megatron.core import parallel_state

    name, base, *numbers = words.split("=")
    tensor, pipeline, expert = sizes = [int(number) for number in numbers]
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
    )  # fmt: skip
    config = AutoConfig.from_pretrained(base)
    vision = hasattr(config, "vision_config")
    model = VisionLanguage(config, *sizes) if vision else language(config, config.tie_word_embeddings, *sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    loaded = checkpointing.load({"model": model.sharded_state_dict()}, str(work / name / "release"))
    model.load_state_dict(loaded["model"], strict=False)
    rows = config.get_text_config().vocab_size
    unread = []
    with torch.no_grad():
        for title, parameter in model.named_parameters():
            padded = title.endswith(("word_embeddings.weight", "output_layer.weight"))
            first = parameter.shape[0] * parallel_state.get_tensor_model_parallel_rank() if padded else 0
            kept = parameter[: max(0, rows - first)] if padded else parameter
            if kept.isnan().any():
                unread.append(title)
    target = work / f"{name}-tp{tensor}-pp{pipeline}-ep{expert}"
    if dist.get_rank() == 0:
        target.mkdir()
    dist.barrier()
    checkpointing.save({"model": model.sharded_state_dict()}, str(target), sharded_strategy=("torch_dist", 1))
    off = None if pipeline > 1 else error(model, Path(base), config)
    dist.barrier()
    parallel_state.destroy_model_parallel()
    return {"job": words, "unread": unread, "error": off}


def main() -> None:
    import torch.distributed as dist

    port, rank, work = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    on_cpu()
    for words in sys.argv[4:]:
        print(json.dumps(job(work, words)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":  # Megatron's writer starts processes that import this file
    main()
