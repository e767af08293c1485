"""What `args` of Megatron and configs of Hugging Face say of experts and their router, in each other's words."""

from argparse import Namespace
from typing import Any

from transformers import PreTrainedConfig

from ee_scale.errors import UserError
from ee_scale.families.experts import ExpertNames
from ee_scale.families.registry import experts_of

# args that must have this value (or be absent), because no family here has another router.
ROUTER = {
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_limited_devices": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "moe_apply_probs_on_input": False,
}
# Those that a config must agree with.
AGREEING = (*ROUTER, "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax")


def check_experts(config: PreTrainedConfig) -> None:
    """Raise `UserError` for experts that Megatron's GPT model cannot compute."""
    experts = experts_of(config)
    if experts is None:
        return
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None)
    if step != 1 or dense:
        raise UserError(
            f"config.decoder_sparse_step={step}, mlp_only_layers={dense}: layers without experts among those with "
            "experts cannot be converted"
        )
    chosen, count = config.num_experts_per_tok, config.num_experts
    if not 1 <= chosen <= count:
        raise UserError(f"config.num_experts_per_tok={chosen}: give a number from 1 to num_experts={count}")
    if chosen == 1 and _normalised(config, experts):
        raise UserError(
            "config.num_experts_per_tok=1 with weights that sum to 1: Megatron weighs the one expert by its probability"
        )


def _normalised(config: PreTrainedConfig, experts: ExpertNames) -> bool:
    return experts.normalised is None or getattr(config, experts.normalised)


def expert_args(config: PreTrainedConfig) -> dict[str, Any]:
    """For Megatron."""
    experts = experts_of(config)
    if experts is None:
        return {"num_experts": None}
    return {
        "num_experts": config.num_experts,
        "moe_ffn_hidden_size": getattr(config, experts.width),
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_pre_softmax": not _normalised(config, experts),
        "moe_aux_loss_coeff": config.router_aux_loss_coef,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        **ROUTER,
    }


def plain(args: Namespace) -> Namespace:
    """What says the same in several ways, in one: a width left to its default, experts in every layer as a list."""
    values = dict(vars(args))
    values["moe_ffn_hidden_size"] = values.get("moe_ffn_hidden_size") or values.get("ffn_hidden_size")
    pattern = values.get("moe_layer_freq")
    if isinstance(pattern, list) and pattern == [1] * len(pattern):
        values["moe_layer_freq"] = 1
    return Namespace(**values)


def expert_values(args: Namespace, experts: ExpertNames) -> dict[str, Any]:
    """For the config of a family. Raises `UserError`."""
    args = plain(args)
    for name, value in ROUTER.items():
        if (found := getattr(args, name, value)) != value and (found or value):
            raise UserError(f"args.{name}={found}: only {value} can be told to Hugging Face's families")
    pre_softmax = bool(getattr(args, "moe_router_pre_softmax", False))
    if pre_softmax and experts.normalised is None:
        raise UserError("args.moe_router_pre_softmax=True: the weights of a token's experts sum to 1 in this family")
    coefficient = getattr(args, "moe_aux_loss_coeff", 0.0)
    return {
        "num_experts": args.num_experts,
        experts.width: args.moe_ffn_hidden_size,
        "num_experts_per_tok": getattr(args, "moe_router_topk", 2),
        "router_aux_loss_coef": coefficient if isinstance(coefficient, float) else 0.0,
        **({experts.normalised: not pre_softmax} if experts.normalised else {}),
    }
