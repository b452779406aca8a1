import pytest
from jax.sharding import PartitionSpec as P

from sharding.mesh import make_mesh
from sharding.rules import PRESETS, ShardingError, ShardingRules

# What a Flash-like model allows: 4 KV heads, groups of 8, experts cut into 16 parts.
SIZES = {
    "kv_heads": 4,
    "group": 8,
    "qkv_row": 3392,
    "mlp": 128,
    "expert": 32,
    "expert_mlp": 16,
    "vocab": 152_576,
    "features": 4096,
}


def fitted(name: str, mesh: str, **sizes: int) -> dict[str, tuple[str, ...]]:
    return dict(ShardingRules.preset(name).fitted({**SIZES, **sizes}, make_mesh(mesh)).axes)


def test_no_rule_splits_nothing():
    assert ShardingRules.preset("single").spec(["batch", "vocab", None]) == P(None, None, None)
    assert ShardingRules.of({"mlp": None, "vocab": "", "batch": ()}) == ShardingRules()
    assert str(ShardingRules()) == "nothing is split"


def test_partition_of_an_array():
    rules = ShardingRules.of({"batch": "data", "kv_heads": ["expert", "tensor"]})
    assert rules.spec(["batch", "slot", "kv_heads", None]) == P(
        "data", None, ("expert", "tensor"), None
    )
    assert rules.replace(batch=None, vocab="tensor").spec(["batch", "vocab"]) == P(None, "tensor")
    assert rules.ways("kv_heads", make_mesh("expert=2,tensor=4")) == 8


def test_what_divides_is_split_as_the_preset_says():
    rules = fitted("latency", "data=2,tensor=4")
    assert rules == {
        "batch": ("data",),
        **dict.fromkeys(("kv_heads", "mlp", "vocab", "features", "expert_mlp"), ("tensor",)),
    }
    rules = fitted("throughput", "data=2,expert=4")
    assert rules == {"batch": ("data", "expert"), "expert": ("expert",)}
    assert fitted("wide_experts", "data=2,expert=4")["expert"] == ("data", "expert")
    assert fitted("latency_experts", "expert=2,tensor=4")["expert"] == ("expert", "tensor")


def test_too_few_kv_heads_split_their_groups():
    """KV heads take the axes that divide them; query heads of a group and QKV rows the others."""
    rules = fitted("latency", "expert=2,tensor=4")
    assert rules["kv_heads"] == ("tensor",)
    assert rules["group"] == rules["qkv_row"] == ("expert",)
    rules = fitted("latency", "tensor=8")
    assert "kv_heads" not in rules
    assert rules["group"] == rules["qkv_row"] == ("tensor",)


def test_attention_that_divides_neither_way_stays_whole():
    rules = fitted("latency", "tensor=8", group=4)
    assert "kv_heads" not in rules
    assert "group" not in rules
    assert rules["qkv_row"] == rules["expert_mlp"] == ("tensor",)


def test_experts_too_narrow_to_be_cut_are_split_whole():
    rules = fitted("latency", "expert=2,tensor=4", expert_mlp=3)
    assert rules["expert"] == ("expert", "tensor")
    assert "expert_mlp" not in rules


def test_what_does_not_divide_is_refused_with_a_sentence():
    with pytest.raises(
        ShardingError,
        match=r"expert has 12 indivisible parts, which expert=8 = 8 devices cannot share evenly; "
        "choose a mesh",
    ):
        fitted("throughput", "expert=8", expert=12)
    with pytest.raises(ShardingError, match=r"expert has 12 .* expert=2 x tensor=4 = 8 devices"):
        fitted("latency", "expert=2,tensor=4", expert_mlp=3, expert=12)


def test_unknown_names():
    with pytest.raises(ShardingError, match="no rules are called 'fast'; there are single, lat"):
        ShardingRules.preset("fast")
    with pytest.raises(ShardingError, match=r"'mlp' names mesh axes \['model'\]; the mesh has"):
        ShardingRules.of({"mlp": "model"}).fitted(SIZES, make_mesh("tensor=2"))


def test_an_array_uses_a_mesh_axis_once():
    rules = ShardingRules.of({"kv_heads": "tensor", "embed": "tensor"})
    with pytest.raises(
        ShardingError,
        match=r"w: rules split both 'embed' and 'kv_heads' by mesh axis 'tensor'",
    ):
        rules.check("w", ["embed", "kv_heads"], [8, 8], make_mesh("tensor=2"))


def test_an_array_must_divide():
    rules = ShardingRules.of({"vocab": "tensor"})
    rules.check("w", ["vocab", None], [8, 3], make_mesh("tensor=4"))
    with pytest.raises(ShardingError, match="w: vocab has 6 indivisible parts, which tensor=4"):
        rules.check("w", ["vocab", None], [6, 3], make_mesh("tensor=4"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_every_mesh_they_divide(name):
    """No preset collides with itself once fitted, whatever spills."""
    arrays = [
        ("kv_heads", "qkv_row", "embed"),
        ("embed", "kv_heads", "group"),
        ("expert", "expert_mlp", "embed"),
        ("mlp", "embed"),
        ("vocab", "embed"),
        (None, "features"),
        ("batch", "slot", "kv_heads", None),
    ]
    sizes = {**SIZES, "batch": 8, "slot": 7, "embed": 5}
    for shape in ((1, 1, 8), (1, 2, 4), (2, 2, 2), (8, 1, 1), (1, 8, 1), (2, 1, 4)):
        mesh = make_mesh(",".join(f"{a}={n}" for a, n in zip(("data", "expert", "tensor"), shape)))
        for narrow in (SIZES["expert_mlp"], 3):
            sized = {**SIZES, "expert_mlp": narrow}
            rules = ShardingRules.preset(name).fitted(sized, mesh)
            for axes in arrays:
                known = [{**sizes, **sized}.get(a or "", 4096) for a in axes]
                rules.check(name, axes, known, mesh)
