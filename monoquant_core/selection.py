"""Which tensor gets which scheme: the user's rules, the recipe, ties and fuse groups. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from monoquant_core import options as opts
from monoquant_core.declarations import SchemeDeclaration
from monoquant_core.errors import PlanError, RecipeError, UnknownNameError
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.planning import Action, Decision, alike, listing
from monoquant_core.plugins import Registry
from monoquant_core.probes import ProbeResult
from monoquant_core.recipe import (
    DEFAULT,
    KEEP,
    NONE,
    DefaultRecipe,
    NoRecipe,
    Recipe,
    RecipeSource,
    Rule,
    Text,
    near_names,
    refuse_base,
)
from monoquant_core.schemes import Proposal, Quantizer, Refusal
from monoquant_core.stats import TensorStats, input_stats


class Chooser:
    """Applies rules in order: the user's, the recipe's, the base recipe's; what none takes gets the scheme."""

    def __init__(
        self,
        registry: Registry,
        recipe: Recipe,
        rules: Sequence[Rule],
        scheme: str,
        scheme_options: Mapping[str, Any],
        info: ModelInfo,
        specs: Sequence[TensorSpec],
        format_base: str = "",
        stats: Mapping[str, TensorStats] | None = None,
        *,
        floats_stay: bool = False,
    ) -> None:
        """:param floats_stay: whether the scheme is only for finished tensors that a format refuses."""
        self.registry, self.model, self.stats, self.floats_stay = registry, info.name, stats or {}, floats_stay
        self.own_rules = (*rules, *recipe.rules)
        self.scheme, self.options = scheme or recipe.scheme, dict(recipe.options) | dict(scheme_options)
        if scheme and recipe.scheme and scheme.lower() != recipe.scheme.lower():
            self.options = dict(scheme_options)
        self.base = recipe.base
        if not floats_stay and self.scheme.lower() in registry.recipes:
            if recipe.base:
                raise RecipeError(f"{self.scheme!r} is itself a recipe; leave out base = {recipe.base!r}")
            self.base, base_options, self.scheme, self.options = self.scheme, self.options, "", {}
            self.asked = Recipe(registry.recipe(self.base).name, base_options)
        else:
            base_options = {}
            self.asked = Recipe(self.scheme, self.options, self.base)
        self.base_rules = self._base_rules(self.base or format_base or DEFAULT, base_options, info, specs)
        self.refused: list[tuple[TensorSpec, str, Refusal]] = []
        self._bound: dict[str, tuple[str, Quantizer]] = {}
        self._check_rules_match(specs)
        if self.scheme:
            self.bind(self.scheme, self.options, "--scheme")
        for rule in self.own_rules:
            if rule.scheme != KEEP:
                self.bind(rule.scheme, rule.options, rule.label)

    def decide(self, spec: TensorSpec) -> Decision:
        """What the first rule that matches says of a tensor; refusals are collected."""
        rule = next((r for r in self.own_rules if r.matches(spec)), None)
        own = rule is not None
        if spec.encoding is not None:
            return Decision(spec, "keep", f"already quantized as {spec.encoding}; its codes stay")
        if not spec.is_float:
            if rule is not None and rule.scheme != KEEP and rule.match == (spec.name,):
                raise PlanError(f"{spec.name}: {spec.dtype} is not a float that {rule.scheme} can quantize")
            return Decision(spec, "keep", f"{spec.dtype}: not a float to be quantized")
        if self.floats_stay:
            return Decision(spec, "keep", "a float, and it stays one")
        rule = rule or self.base_rule(spec)
        chosen: Literal["rule", "default"] = "rule" if own else "default"
        if rule is not None and rule.scheme == KEEP:
            return Decision(spec, "keep", rule.reason or rule.label, chosen=chosen)
        if rule is None and not self.scheme:
            return Decision(spec, "keep", "no scheme given")
        if rule is None:
            label, quantizer = self.bind(self.scheme, self.options, "--scheme")
            reason = f"{spec.kind or 'weight'}: the default scheme"
        else:
            label, quantizer = self.bind(rule.scheme, rule.options, rule.label)
            reason = rule.reason or rule.label
        if spec.numel == 0:
            return Decision(spec, "keep", "has no elements", chosen=chosen)
        proposal = self.propose(quantizer, spec, spec.name)
        if isinstance(proposal, Refusal):
            self.refused.append((spec, label, proposal))
            if proposal.instead is None:
                return Decision(spec, "keep", proposal.reason, chosen=chosen)
            reason, proposal = proposal.reason, proposal.instead  # planned on, to say what it would come to
        action: Action = "cast" if isinstance(proposal.encoding, str) else "quantize"
        if action == "cast" and proposal.encoding == spec.dtype:
            return Decision(spec, "keep", f"is {spec.dtype} already", chosen=chosen)
        return Decision(spec, action, reason, proposal, label, quantizer, chosen)

    def base_rule(self, spec: TensorSpec) -> Rule | None:
        """The first rule of the base recipe that matches."""
        return next((r for r in self.base_rules if r.matches(spec)), None)

    def propose(self, quantizer: Quantizer, spec: TensorSpec, source: str) -> Proposal | Refusal:
        """What a scheme would make of a tensor, with the range of its layer's input where that is known.

        :param source: its name in the source, to find statistics by.
        """
        proposal = quantizer.propose(spec)
        with_ranges = getattr(quantizer, "with_ranges", None)
        if isinstance(proposal, Refusal) or with_ranges is None:
            return proposal
        found = input_stats(self.stats, source)
        if found is None or found.low is None or found.high is None:
            return proposal
        ranged: Proposal = with_ranges(spec, proposal, found)
        return ranged

    @property
    def hopeless(self) -> bool:
        """Whether a scheme refused a tensor and has nothing to offer in its place."""
        return any(refusal.instead is None for _, _, refusal in self.refused)

    def report_refusals(self, bits_per_weight: float | None = None) -> None:
        """One error that names every tensor that its scheme cannot take.

        :param bits_per_weight: of the whole result, with what the schemes would take in their place.
        """
        if not self.refused:
            return
        lines = alike([(s.name, f" {list(s.shape)}: {label}: {r.reason}") for s, label, r in self.refused])
        hints = dict.fromkeys(refusal.hint for _, _, refusal in self.refused if refusal.hint)
        names = " ".join(f"--keep '{s.name}'" for s, _, _ in self.refused[:3])
        more = " ..." if len(self.refused) > 3 else ""
        title = f"{self.model}: the scheme refuses {len(self.refused)} of the tensors chosen for it"
        if bits_per_weight is not None:
            title += f"; with what they would get instead, all tensors take {bits_per_weight:.2f} bits per weight"
        raise PlanError(
            listing(title, lines),
            hint="; ".join([*hints, f"or leave them as they are: {names}{more}"]),
        )

    def bind(self, name: str, values: Mapping[str, Any], owner: str) -> tuple[str, Quantizer]:
        """The scheme with options, and how it is printed."""
        key = f"{name.lower()} {sorted(values.items())}"
        if key not in self._bound:
            declared = self._declaration(name, owner)
            whose = declared.name if owner == "--scheme" else f"{owner}: {declared.name}"
            infos = {i.name: i for i in opts.option_infos(declared.options)}
            typed = {
                k: opts.parse(infos[k], v, owner=whose) if isinstance(v, Text) and k in infos else v
                for k, v in values.items()
            }
            bound: Any = opts.build(declared.options, typed, owner=whose)
            changed = [f"{k}={getattr(bound, k)}" for k, i in infos.items() if getattr(bound, k) != i.default]
            self._bound[key] = (" ".join([declared.name, *changed]), self.registry.make(declared, bound))
        return self._bound[key]

    def as_recipe(self) -> dict[str, Any]:
        """The TOML that repeats this choice."""
        rules = [dataclasses.replace(r, scheme=self._spelled(r.scheme), options=self._typed(r)) for r in self.own_rules]
        scheme = self._spelled(self.scheme) or self.asked.scheme
        return dataclasses.replace(self.asked, scheme=scheme, rules=tuple(rules)).to_dict()

    def _declaration(self, name: str, owner: str) -> SchemeDeclaration:
        refuse_base(name)
        known = name.lower()
        if known in self.registry.recipes and known not in self.registry.schemes and owner != "--scheme":
            raise RecipeError(f"{owner}: {name!r} is a recipe; a rule takes a scheme")
        try:
            return self.registry.scheme(name)
        except UnknownNameError as exc:
            where = "" if owner == "--scheme" else f"{owner}: "
            raise UnknownNameError(f"{where}{exc}", hint=exc.hint) from None

    def _base_rules(
        self, name: str, values: Mapping[str, Any], info: ModelInfo, specs: Sequence[TensorSpec]
    ) -> Sequence[Rule]:
        builtin: dict[str, RecipeSource] = {DEFAULT: DefaultRecipe(), NONE: NoRecipe()}
        if name.lower() in builtin:
            return builtin[name.lower()].rules(info, specs)
        try:
            declared = self.registry.recipe(name)
        except UnknownNameError as exc:
            raise UnknownNameError(f"{exc}; built in: {', '.join(builtin)}", hint=exc.hint) from None
        bound: object = opts.build(declared.options, values, owner=declared.name)
        source: RecipeSource = self.registry.make(declared, bound)
        return source.rules(info, specs)

    def _check_rules_match(self, specs: Sequence[TensorSpec]) -> None:
        for rule in self.own_rules:
            if any(rule.matches(spec) for spec in specs):
                continue
            named = dataclasses.replace(rule, kind="", module="") if rule.match else None
            taken = [spec for spec in specs if named is None or named.matches(spec)]
            what = "kind" if rule.kind and all(spec.kind != rule.kind for spec in taken) else "module"
            present = {getattr(s, what) for s in taken} - {""}
            if rule.match and not taken:
                hint = f"names like it: {', '.join(near_names(rule.match[0], specs))}"
            elif present:
                hint = (
                    f"{'the model has' if named is None else f'its pattern takes {what}'}: {', '.join(sorted(present))}"
                )
            else:
                hint = f"no {what} is known of its tensors: use match (classes are known of modules and .pt2 programs)"
            raise RecipeError(f"{rule.label} matches none of the {len(specs)} tensors", hint=hint)

    def _spelled(self, name: str) -> str:
        return name if name in ("", KEEP) else self._declaration(name, "--scheme").name

    def _typed(self, rule: Rule) -> dict[str, Any]:
        if rule.scheme == KEEP:
            return {}
        declared = self.registry.scheme(rule.scheme)
        infos = {i.name: i for i in opts.option_infos(declared.options)}
        return {
            k: opts.parse(infos[k], v, owner=declared.name) if isinstance(v, Text) else v
            for k, v in rule.options.items()
        }


def ask_plugins(registry: Registry, decision: Decision, probes: Mapping[str, ProbeResult]) -> Decision:
    """The decision after every plugin's ``monoquant_decide``."""
    answer = registry.manager.hook.monoquant_decide(proposed=decision, probes=probes)
    if answer is None:
        return decision
    if not isinstance(answer, Decision) or answer.spec != decision.spec:
        raise PlanError(f"{decision.spec.name}: a plugin's monoquant_decide answered {answer!r}, not a Decision on it")
    return answer


def follow_ties(decisions: list[Decision]) -> list[Decision]:
    """Tied tensors are one tensor: it is quantized once, and stays a float if any of its names must."""
    names = {d.spec.name: d for d in decisions}
    for d in decisions:
        first = names.get(d.spec.tied_to or "")
        if first is not None and d.action == "keep" and d.chosen == "default" and first.chosen == "default":
            if first.action in ("quantize", "cast"):
                names[first.spec.name] = Decision(first.spec, "keep", f"tied to {d.spec.name}: {d.reason}")
        elif first is not None and d.chosen == "rule" and (d.action, d.scheme) != (first.action, first.scheme):
            if first.chosen == "rule":
                raise PlanError(
                    f"{d.spec.name} and {first.spec.name} are one tensor, and rules give them different schemes",
                    hint="give both the same, or name only one",
                )
            names[first.spec.name] = dataclasses.replace(
                d, spec=first.spec, reason=f"tied to {d.spec.name}: {d.reason}"
            )
    return [
        Decision(d.spec, "drop", f"tied to {d.spec.tied_to}: written once")
        if d.spec.tied_to in names
        else names[d.spec.name]
        for d in decisions
    ]


def check_fuse_groups(decisions: Sequence[Decision]) -> None:
    """Refuse different schemes within a group that runtimes join, unless the recipe means them to differ."""
    groups: dict[str, list[Decision]] = {}
    for d in decisions:
        if d.spec.fuse is not None and d.action != "drop":
            groups.setdefault(d.spec.fuse, []).append(d)
    for group, members in groups.items():
        if all(d.chosen == "default" for d in members):
            continue
        if len({(d.action, d.scheme) for d in members if d.spec.encoding is None}) > 1:
            shown = ", ".join(f"{d.spec.name} ({d.scheme or d.action})" for d in members[:6])
            raise PlanError(
                f"{group}: runtimes join these into one matrix, so they need one scheme: {shown}",
                hint="widen the rule so that it matches all of them",
            )


def check_needs(decisions: Sequence[Decision], stats: Mapping[str, TensorStats]) -> None:
    """Refuse schemes that need statistics of tensors that there are none of."""
    needy = []
    for d in decisions:
        needs = d.proposal.needs if d.proposal is not None and d.action == "quantize" else frozenset()
        found = input_stats(stats, d.spec.name) if needs & {"importance", "ranges"} else None
        lacks_range = "ranges" in needs and (found is None or found.low is None)
        if lacks_range or ("importance" in needs and (found is None or found.importance is None)):
            needy.append(d)
    if not needy:
        return
    more = f" and {len(needy) - 1} more" if len(needy) > 1 else ""
    keep = f"; or keep what no batch reached: --keep '{needy[0].spec.name}'" if stats else ""
    raise PlanError(
        f"{needy[0].scheme} needs calibration statistics of what goes into {needy[0].spec.name}{more}",
        hint=f"give --data or --stats (stats= in Python), or choose a scheme that needs none{keep}",
    )


def check_not_empty(decisions: Sequence[Decision], info: ModelInfo) -> None:
    """Refuse a quantization that would quantize nothing."""
    if any(d.action in ("quantize", "cast") for d in decisions):
        return
    reasons: dict[str, int] = {}
    for d in decisions:
        reasons[d.reason] = reasons.get(d.reason, 0) + 1
    common = sorted(reasons.items(), key=lambda item: -item[1])[:3]
    text = "; ".join(f"{count} x {reason}" for reason, count in common)
    raise PlanError(
        f"{info.name}: nothing would be quantized: {text or 'the model has no tensors'}",
        hint="choose tensors with --set 'PATTERN=SCHEME', or copy the model with export",
    )
