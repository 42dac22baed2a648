"""Recipes: what they accept, what they refuse, and in whose words."""

import pytest
import tomli_w

from monoquant_core.errors import RecipeError
from monoquant_core.model import TensorSpec
from monoquant_core.recipe import KEEP, Recipe, Rule, keep_rule, load_recipe, near_names, parse_set

Q = TensorSpec("model.layers.0.self_attn.q_proj.weight", (8, 8), "float32", kind="linear", module="Linear")
Q_BIAS = TensorSpec("model.layers.0.self_attn.q_proj.bias", (8,), "float32", kind="bias", module="Linear")


@pytest.mark.parametrize(
    ("rule", "hits"),
    [
        (Rule("int4", ("*.q_proj.weight",)), [Q]),
        (Rule("int4", ("*.q_proj",)), [Q]),  # a module's name takes its matrices
        (Rule(KEEP, ("*.q_proj",)), [Q, Q_BIAS]),
        (Rule("int4", (r"re:layers\.\d\.self_attn\.[qk]_proj\.weight",)), [Q]),
        (Rule("int4", ("q_proj.weight",)), []),  # a glob is the whole name
        (Rule("int4", kind="linear"), [Q]),
        (Rule("int4", kind="linear", module="Conv2d"), []),
        (Rule("int4", module="Linear", kind="linear", match=("*",)), [Q]),
    ],
)
def test_what_a_rule_takes(rule, hits):
    assert [s for s in (Q, Q_BIAS) if rule.matches(s)] == hits


@pytest.mark.parametrize(
    ("text", "pattern", "scheme", "options"),
    [
        ("*.down_proj=int8", "*.down_proj", "int8", {}),
        ("*.down=int4:group_size=32", "*.down", "int4", {"group_size": "32"}),
        ("*.down=int4:group-size=32,symmetric=false", "*.down", "int4", {"group_size": "32", "symmetric": "false"}),
        ("re:a=b.*=int4:group_size=32", "re:a=b.*", "int4", {"group_size": "32"}),
        ("re:x:y=keep", "re:x", "keep", None),
    ],
)
def test_set_is_split_at_the_last_equals_before_the_options(text, pattern, scheme, options):
    if options is None:  # ":y=keep" reads as an option: the part before it has no scheme
        with pytest.raises(RecipeError, match="--set"):
            parse_set(text)
        return
    rule = parse_set(text)
    assert (rule.match, rule.scheme, dict(rule.options)) == ((pattern,), scheme, options)


@pytest.mark.parametrize("text", ["", "nothing", "=int8", "a=", "a=int8:group_size=3,oops"])
def test_malformed_set_is_refused(text):
    with pytest.raises(RecipeError):
        parse_set(text)


def test_toml_round_trip(tmp_path):
    recipe = Recipe(
        "int4",
        {"group_size": 64},
        "default",
        (Rule("int8", ("*.down_proj", "re:x"), options={"symmetric": False}), Rule(KEEP, kind="conv", reason="small")),
    )
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe.to_dict()))
    again = load_recipe(path)
    assert again.to_dict() == recipe.to_dict()
    assert again.rules[0].origin == f"{path}: rule 1 (*.down_proj and re:x)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme = 3", "scheme has the wrong type"),
        ("shceme = 'int8'", "unknown key 'shceme'"),
        ("[[rules]]\nmatch = '*'", "rule 1: scheme is missing"),
        ("[[rules]]\nscheme = 'int8'", "give match, kind or module"),
        ("[[rules]]\nscheme = 'int8'\nmatch = [1]", "match is a pattern or a list"),
        ("[[rules]]\nscheme = 'int8'\nmatch = 're:('", "not a regular expression"),
        ("[[rules]]\nscheme = 'keep'\nmatch = '*'\noptions = {a = 1}", "'keep' takes no options"),
        ("rules = [1]", "a table expected"),
        ("not toml", "not TOML"),
    ],
)
def test_refused_recipes_say_where(tmp_path, text, message):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=".*") as caught:
        load_recipe(path)
    assert message in str(caught.value)


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="nowhere.toml"):
        load_recipe(tmp_path / "nowhere.toml")


def test_near_names():
    specs = [Q, Q_BIAS, TensorSpec("lm_head.weight", (8, 8), "float32")]
    assert near_names("*q_porj*", specs)[0] == Q.name
    assert near_names("lmhead", specs)[0] == "lm_head.weight"
    assert keep_rule("x").label == "--keep 'x'"
