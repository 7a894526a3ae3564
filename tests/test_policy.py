"""QuantPolicy: which rule wins for a layer, what it means, and what is refused."""

import json

import pytest

import qat.policy
from qat import QuantPolicy, QuantSpec
from qat.errors import PolicyError, QATError, SpecError

W4 = QuantSpec(bits=4, group_size=64)
A8 = QuantSpec(bits=8, granularity="tensor")
# (name, type, quantizable), in definition order
LAYERS = [
    ("embed", "Embedding", False),
    ("stem", "Conv2d", True),
    ("blocks.0.attn.q_proj", "Linear", True),
    ("blocks.0.attn.k_proj", "Linear", True),
    ("blocks.0.mlp.fc", "Linear", True),
    ("blocks.1.mlp.fc", "Linear", True),
    ("head", "Linear", True),
    ("unused", "Bilinear", False),
]
# pattern: the layers it matches, by index
PATTERNS = {
    "head": [6],
    "blocks.*.mlp.*": [4, 5],
    "*": [0, 1, 2, 3, 4, 5, 6, 7],
    "blocks.?.mlp.fc": [4, 5],
    "blocks.[1-9].*": [5],
    r"re:.*[qk]_proj": [2, 3],
    r"re:blocks\.1\..*": [5],
    "re:stem|head": [1, 6],
    "re:mlp|head": [6],
    "Conv2d": [1],
    "Linear": [2, 3, 4, 5, 6],
    "Embedding": [0],
    "@first": [1],
    "@last": [6],
}


def rule(match, weight=None, **more):
    return {"match": match, "weight": weight, **more}


def check_patterns(policy):
    for pattern, expected in PATTERNS.items():
        winners = policy.match_rules([rule(pattern)], LAYERS)
        assert [index for index, winner in enumerate(winners) if winner] == expected, pattern


def check_last_rule_wins(policy):
    rules = [rule("Linear", {"bits": 8}), rule("blocks.*", {"bits": 3}), rule("blocks.1.*", {"bits": 2})]
    winners = policy.match_rules(rules, LAYERS)
    assert [winner and winner["weight"]["bits"] for winner in winners] == [None, None, 3, 3, 3, 2, 8, None]


def check_merging(policy):
    """A rule's dict changes some fields of the policy's spec; a rule that leaves a key out leaves its spec alone."""
    made = policy.QuantPolicy(weight=W4, activation=A8)
    assert made.specs_of(rule("x", {"bits": 8})) == (QuantSpec(bits=8, group_size=64), A8)
    assert made.specs_of(rule("x", {"group_size": 32})) == (QuantSpec(bits=4, group_size=32), A8)
    assert made.specs_of(rule("x", {"granularity": "channel"})) == (QuantSpec(bits=4), A8)
    assert made.specs_of(rule("x", None)) == (None, A8)
    assert made.specs_of({"match": "x", "activation": None}) == (W4, None)
    assert made.specs_of({"match": "x", "activation": {"signed": True}})[1] == QuantSpec(
        bits=8, granularity="tensor", signed=True
    )
    assert made.specs_of(rule("x", QuantSpec(bits=3))) == (QuantSpec(bits=3), A8)
    assert made.specs_of(None) == (W4, A8)


def check_every_rule_must_match(policy):
    with pytest.raises(PolicyError, match=r"'haed' matched no layer.*did you mean 'head'"):
        policy.match_rules([rule("head"), rule("haed")], LAYERS)
    with pytest.raises(PolicyError, match=r"'Conv2D' matched no layer.*did you mean 'Conv2d'"):
        policy.match_rules([rule("Conv2D")], LAYERS)


def test_patterns():
    check_patterns(qat.policy)


def test_the_last_rule_wins():
    check_last_rule_wins(qat.policy)


def test_rules_merge_into_the_policy():
    check_merging(qat.policy)


def test_a_rule_that_matches_nothing():
    check_every_rule_must_match(qat.policy)


@pytest.mark.parametrize("pattern", ["Head", "blocks.0.mlp", "re:q_proj", "@first"])
def test_matching_is_exact(pattern):
    """Case counts, a name or regular expression matches in full, and @first needs a layer that can be quantized."""
    layers = [layer for layer in LAYERS if not layer[2]] if pattern == "@first" else LAYERS
    with pytest.raises(PolicyError, match="matched no layer"):
        qat.policy.match_rules([rule(pattern)], layers)


def test_specs_are_built_from_dicts():
    policy = QuantPolicy(weight={"bits": 3, "group_size": 32}, activation={"bits": 8})
    assert policy.weight == QuantSpec(bits=3, group_size=32)
    assert policy.activation == A8
    assert QuantPolicy(rules=[rule("x", {"bits": 8})]).specs_of(rule("x", {"bits": 8}))[0] == QuantSpec(bits=8)


def test_quantizes_nothing():
    assert QuantPolicy().quantizes_nothing()
    assert not QuantPolicy(weight=W4).quantizes_nothing()
    assert not QuantPolicy(rules=[rule("head", {"bits": 8})]).quantizes_nothing()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"match": "x", "wieght": None}, r"unknown key 'wieght'.*did you mean 'weight'"),
        ({"match": "x", "weight": None, "bits": 4}, "unknown key 'bits'"),
        ({"weight": None}, "is no rule: give match"),
        ({"match": "x"}, "is no rule: give match"),
        ("head", "is no rule: give match"),
        ({"match": "re:[", "weight": None}, "no regular expression"),
        ({"match": "@frist", "weight": None}, r"unknown.*did you mean '@first'"),
        ({"match": "x", "weight": 4}, "4 is no spec"),
        ({"match": "x", "weight": {"signed": False}}, "weights are always signed"),
        ({"match": "x", "activation": {"symmetric": False, "signed": False}}, "has its own zero"),
        ({"match": "x", "activation": {"symmetric": False, "zero_point_dtype": "float16"}}, "have no real zero points"),
        ({"match": "x", "activation": {"granularity": "channel"}}, "activations take granularity='tensor'"),
    ],
)
def test_a_bad_rule_is_refused_when_the_policy_is_built(bad, message):
    with pytest.raises(PolicyError, match=message):
        QuantPolicy(weight=W4, rules=[bad])


def test_a_bad_field_in_a_rule_is_refused_when_the_policy_is_built():
    with pytest.raises(SpecError, match="from 2 to 8"):
        QuantPolicy(rules=[rule("x", {"bits": 16})])
    with pytest.raises(SpecError, match="unknown key 'groupsize'"):
        QuantPolicy(rules=[rule("x", {"groupsize": 16})])
    with pytest.raises(SpecError, match=r"init='lqs'.*did you mean 'lsq'"):
        QuantPolicy(init="lqs")


def test_round_trip_through_json():
    policy = QuantPolicy(
        weight=W4,
        activation=A8,
        rules=[rule("head"), rule("@first", {"bits": 8}), rule("x", QuantSpec(3))],
        init="minmax",
    )
    again = QuantPolicy.from_dict(json.loads(json.dumps(policy.to_dict())))
    assert again.to_dict() == policy.to_dict()
    assert [again.specs_of(r) for r in again.rules] == [policy.specs_of(r) for r in policy.rules]
    assert (again.weight, again.activation, again.init) == (W4, A8, "minmax")


def test_unknown_key_in_a_policy():
    with pytest.raises(PolicyError, match=r"unknown key 'weights'.*did you mean 'weight'"):
        QuantPolicy.from_dict({"weights": {"bits": 4}})


def test_from_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "weight: {bits: 3, group_size: 32}\n"
        "activation: {bits: 8}\n"
        "rules:\n  - {match: '@first', weight: {bits: 8}}\n  - {match: lm_head, weight: null, activation: null}\n"
        "init: minmax\n"
    )
    policy = QuantPolicy.from_yaml(path)
    assert policy.weight == QuantSpec(bits=3, group_size=32)
    assert policy.activation == A8 and policy.init == "minmax"
    assert policy.specs_of(policy.rules[0]) == (QuantSpec(bits=8, group_size=32), A8)
    assert policy.specs_of(policy.rules[1]) == (None, None)


def test_shipped_policies_by_name():
    assert QuantPolicy.from_yaml("lm_w4").weight.bits == 4
    assert QuantPolicy.from_yaml("none").quantizes_nothing()
    with pytest.raises(PolicyError, match=r"no policy file 'lm_w5'.*did you mean 'lm_w4'"):
        QuantPolicy.from_yaml("lm_w5")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "", "just words\n"])
def test_a_file_that_holds_no_policy(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    if text:
        with pytest.raises(PolicyError):
            QuantPolicy.from_yaml(path)
    else:
        assert QuantPolicy.from_yaml(path).quantizes_nothing()


def test_a_file_that_is_no_yaml(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("weight: {bits: 4\n")
    with pytest.raises(PolicyError, match=r"bad\.yaml is no YAML: .*line 1"):
        QuantPolicy.from_yaml(path)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"weight": {"bits": 8}}, "codebook='nf4' has 4 bits, not 8; codebook: null has any"),
        ({"activation": {"bits": 1}}, "bits=1: give a whole number"),
        ({"activation": {"granularity": "channel"}}, "activations take granularity='tensor'"),
        ({"weight": {"bist": 8}}, "unknown key 'bist'"),
    ],
)
def test_a_rule_that_cannot_be_is_named(rule, said):
    """As where it takes a field of the policy's own spec that does not go with its bits."""
    with pytest.raises(QATError, match=r"the rule with match='@first': .*" + said):
        QuantPolicy(weight={"codebook": "nf4", "bits": 4}, rules=[{"match": "@first", **rule}])
