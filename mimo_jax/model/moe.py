"""The mixture-of-experts layer: a sigmoid router and its experts (MODEL_SPEC 2.12)."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from mimo_jax.config import MiMoConfig
from mimo_jax.model.expert_parallel import experts_on_mesh
from mimo_jax.model.layers import RMSNorm
from mimo_jax.model.parameters import Format, Make, ParamSpec, declare
from mimo_jax.model.taps import Taps
from pallas_kernels.all_reduce.exchange import Exchange


class MoE(nnx.Module):
    """The routed feed-forward of one decoder layer; no shared expert, no token dropping."""

    def __init__(self, config: MiMoConfig, index: int, name: str, fmt: Format, make: Make):
        self.index = index
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        e, f, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        router_dtype = "bfloat16" if config.moe_router_dtype == "bfloat16" else "float32"
        self.gate = declare(
            make, ParamSpec(f"{name}.gate.weight", (e, d), (None, "embed"), dtype=router_dtype)
        )
        self.e_score_correction_bias = declare(
            make,
            ParamSpec(
                f"{name}.gate.e_score_correction_bias",
                (e,),
                (None,),
                init="zeros",
                dtype="float32",
            ),
        )

        def experts(projection: str, out: int, in_: int, axes: tuple[str, str]) -> nnx.Param:
            spec = ParamSpec(
                f"{name}.experts.{{}}.{projection}.weight",
                (e, out, in_),
                ("expert", *axes),
                format=fmt,
            )
            return declare(make, spec)

        self.gate_proj = experts("gate_proj", f, d, ("expert_mlp", "embed"))
        self.up_proj = experts("up_proj", f, d, ("expert_mlp", "embed"))
        self.down_proj = experts("down_proj", d, f, ("embed", "expert_mlp"))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        norm: RMSNorm,
        taps: Taps,
        exchange: Exchange | None = None,
    ) -> Float[Array, "B T D"]:
        """The residual stream x with the experts of norm(x) added; routed in float32."""
        y, scores, chosen = experts_on_mesh(
            x,
            norm.weight[...],
            self.gate[...],
            self.e_score_correction_bias[...],
            self.gate_proj.get_value(),
            self.up_proj.get_value(),
            self.down_proj.get_value(),
            eps=norm.eps,
            top_k=self.top_k,
            normalize=self.normalize,
            scale=self.scale,
            kernels=norm.kernels,
            exchange=exchange,
        )
        taps.record(f"router.{self.index}", scores)
        taps.record(f"experts.{self.index}", chosen)
        return y
