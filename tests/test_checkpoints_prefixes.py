import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loramgr.checkpoints.prefixes import Renaming, find_renaming, fitting_renamings
from loramgr.errors import IncompatibleError

COMPONENT = st.sampled_from(["a", "b", "encoder", "model", "layers", "query"])
PREFIX = st.lists(st.sampled_from(["bert", "model", "transformer", "language_model"]), max_size=2).map(
    lambda parts: "".join(f"{part}." for part in parts)
)
NAME = st.builds(
    lambda parts, number, leaf: ".".join([*parts, str(number), leaf, "weight"]),
    st.lists(COMPONENT, min_size=1, max_size=3),
    st.integers(0, 3),
    COMPONENT,
)


@given(st.sets(NAME, min_size=1, max_size=8), st.sets(NAME, max_size=8), PREFIX, PREFIX)
def test_one_change_brings_all_names_home(stems: set[str], others: set[str], dropped: str, added: str) -> None:
    required = {dropped + stem for stem in stems}
    base = {added + stem for stem in stems | others}
    fitting = fitting_renamings(required, base)
    assert fitting
    if len(fitting) > 1:
        with pytest.raises(IncompatibleError, match="ambiguous"):
            find_renaming(required, base)
        return
    renaming = find_renaming(required, base)
    assert {renaming.apply(name) for name in required} <= base
    assert len({renaming.apply(name) for name in required}) == len(required)


@given(st.sets(NAME, min_size=2, max_size=8), PREFIX)
def test_a_missing_name_is_never_made_up(stems: set[str], prefix: str) -> None:
    missing = min(stems)
    base = {prefix + stem for stem in stems - {missing}}
    assume(not any(name == missing or name.endswith(f".{missing}") for name in base))
    assume(not any(name.rpartition(".layers.")[2] == missing.rpartition(".layers.")[2] for name in base))
    with pytest.raises(IncompatibleError):
        find_renaming({f"model.0.{stem}" for stem in stems}, base)


@given(st.sets(NAME, min_size=1), st.sets(NAME))
def test_names_that_fit_stay(names: set[str], others: set[str]) -> None:
    assert find_renaming(names, names | others) == Renaming()


@pytest.mark.parametrize(
    ("trained", "stored", "renaming"),
    [
        ("bert.encoder.layer.0.q.weight", "encoder.layer.0.q.weight", Renaming("bert.", "")),
        ("encoder.layer.0.q.weight", "bert.encoder.layer.0.q.weight", Renaming("", "bert.")),
        ("model.layers.0.q.weight", "layers.0.q.weight", Renaming("model.", "")),
        ("transformer.h.0.q.weight", "h.0.q.weight", Renaming("transformer.", "")),
        ("model.language_model.layers.0.q.weight", "language_model.model.layers.0.q.weight",
         Renaming("model.language_model.", "language_model.model.")),
        ("model.layers.0.q.weight", "language_model.model.layers.0.q.weight", Renaming("", "language_model.")),
    ],
)  # fmt: skip
def test_real_prefixes(trained: str, stored: str, renaming: Renaming) -> None:
    assert find_renaming([trained], [stored, "other.weight"]) == renaming


def test_ambiguity_names_two_candidates() -> None:
    base = ["text_model.encoder.0.q.weight", "vision_model.encoder.0.q.weight"]
    with pytest.raises(IncompatibleError, match=r"text_model\.encoder.*vision_model\.encoder.*ambiguous"):
        find_renaming(["encoder.0.q.weight"], base)


@pytest.mark.parametrize(
    ("trained", "stored"),
    [
        (["model.layers.2.q.weight"], ["model.layers.0.q.weight"]),
        (["layers.0.q.weight"], ["model.layers.1.layers.0.q.weight"]),
        (["bert.a.q.weight", "roberta.a.k.weight"], ["a.q.weight", "a.k.weight"]),
        (["a.q.weight"], ["a.qq.weight", "weight"]),
        (["q.weight"], []),
    ],
)
def test_what_must_not_fit(trained: list[str], stored: list[str]) -> None:
    with pytest.raises(IncompatibleError, match="has no module"):
        find_renaming(trained, stored)


def test_the_error_names_the_closest() -> None:
    with pytest.raises(IncompatibleError, match=r"no module h\.0\.attn\.qq .* h\.0\.attn\.q\.weight"):
        find_renaming(["h.0.attn.q.weight", "h.0.attn.qq.weight"], ["h.0.attn.q.weight", "h.0.attn.k.weight"])
