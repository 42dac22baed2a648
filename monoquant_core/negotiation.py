"""What a format makes of the decisions: outputs, verdicts, and what to do where scheme and format differ. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from monoquant_core.encoding import Encoding
from monoquant_core.errors import PlanError, UnsupportedEncodingError
from monoquant_core.exporters import Drop, Exporter, Holds, Output, Placed, Refuses, Repacks, Verdict
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.planning import Action, Decision, OnUnsupported, Step, alike, listing
from monoquant_core.recipe import KEEP
from monoquant_core.schemes import Proposal, Quantizer, Refusal
from monoquant_core.selection import Chooser


class _Refused(NamedTuple):
    """An output that the format does not hold."""

    output: str
    reason: str
    hint: str
    chosen: str  #: the source tensor that a scheme was chosen for, and that could be kept instead; "" without one


class Placer:
    """Turns decisions into outputs of a format, negotiating where scheme and format differ."""

    def __init__(
        self,
        decisions: Sequence[Decision],
        info: ModelInfo,
        exporter: Exporter | None,
        on_unsupported: OnUnsupported,
        chooser: Chooser,
    ) -> None:
        self.decisions = {d.spec.name: d for d in decisions}
        self.info, self.exporter, self.on_unsupported, self.chooser = info, exporter, on_unsupported, chooser
        self.refused: list[_Refused] = []
        self.from_finished_file = False
        self.notes: list[str] = []

    def place(self) -> tuple[list[Step], list[Decision], list[str]]:
        """The steps, the decisions as they are after negotiation, and notes for the user."""
        steps = []
        for out in self._outputs():
            step = self._place(out)
            if step is not None:
                steps.append(step)
        settle: Callable[..., Iterable[Output]] | None = getattr(self.exporter, "settle", None)
        if settle is not None and not self.refused:
            steps = self._settled(steps, settle([step.placed for step in steps]))
        if self.refused:
            name = self.format_name
            hints = list(dict.fromkeys(refused.hint for refused in self.refused if refused.hint))
            chosen = list(dict.fromkeys(refused.chosen for refused in self.refused if refused.chosen))
            if self.from_finished_file and self.on_unsupported == "error":
                hints.append("--on-unsupported dequantize stores them as floats, requantize with --scheme anew")
            elif chosen and not self.from_finished_file:
                names = " ".join(f"--keep '{name}'" for name in chosen[:3])
                hints.append(f"leave them as they are: {names}{' ...' if len(chosen) > 3 else ''}")
            raise UnsupportedEncodingError(
                listing(
                    f"{self.info.name}: {name} cannot hold {len(self.refused)} of {len(self.decisions)} tensors",
                    alike([(refused.output, f": {refused.reason}") for refused in self.refused]),
                ),
                hint="; ".join(hints),
            )
        return steps, list(self.decisions.values()), self.notes

    @property
    def format_name(self) -> str:
        """How messages name the format."""
        return getattr(self.exporter, "name", None) or type(self.exporter).__name__

    def _outputs(self) -> list[Output]:
        specs = [d.spec for d in self.decisions.values()]
        written = [s for s in specs if self.decisions[s.name].action != "drop"]
        if self.exporter is None:
            return [Output(s.name, s.shape, s.dtype, (s.name,)) for s in written]
        outputs, dropped = [], set()
        for item in self.exporter.outputs(written, self.info):
            if isinstance(item, Drop):
                dropped.add(item.name)
                self.decisions[item.name] = Decision(self.decisions[item.name].spec, "drop", item.reason)
            else:
                outputs.append(item)
        covered = dropped.union(*(out.inputs for out in outputs)) if outputs else dropped
        lost = [s.name for s in written if s.name not in covered]
        names = [out.name for out in outputs]
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) != len(names) else []
        if lost or twice:
            raise PlanError(f"{self.format_name}: loses {lost[:3]} and writes twice {twice[:3]}: a bug of the format")
        return outputs

    def _settled(self, steps: Sequence[Step], outputs: Iterable[Output]) -> list[Step]:
        """The steps with outputs that follow from the verdicts on others, in place of those of their name or after."""
        found = {step.placed.output.name: step for step in steps}
        for out in outputs:
            step = found.get(out.name)
            if step is not None and (step.placed.output.shape, step.placed.output.dtype) == (out.shape, out.dtype):
                found[out.name] = dataclasses.replace(step, placed=dataclasses.replace(step.placed, output=out))
            elif (made := self._place(out)) is not None:
                found[out.name] = made
        return list(found.values())

    def _place(self, out: Output) -> Step | None:
        inputs = [self.decisions[name] for name in out.inputs]
        first = inputs[0] if inputs else None
        specs = tuple(d.spec for d in inputs)
        if first is None:
            return self._step(out, None, self._verdict(out, None), specs, "derive", _why(out))
        if any((d.action, d.scheme) != (first.action, first.scheme) for d in inputs):
            names = ", ".join(out.inputs[:4])
            raise PlanError(
                f"{out.name} joins tensors that get different schemes: {names}", hint="give them one scheme"
            )
        if first.spec.encoding is not None:
            return self._place_finished(out, first, specs)
        if first.action == "cast" and first.proposal is not None:
            # A format that already chose another dtype for this tensor keeps its choice.
            dtype = str(first.proposal.encoding)
            out = dataclasses.replace(out, dtype=dtype) if out.dtype == first.spec.dtype else out
        if first.action != "quantize" or first.proposal is None or first.quantizer is None:
            action: Action = "derive" if out.transform else ("cast" if out.dtype != first.spec.dtype else "keep")
            reason = _why(out) or first.reason
            if action == "cast" and first.action != "cast":
                reason = f"{self.format_name} stores it as {out.dtype}"
                self._redecide(inputs, "cast", reason)
            return self._step(out, None, self._verdict(out, None), specs, action, reason, first.scheme)
        return self._place_quantized(out, first, specs)

    def _place_quantized(self, out: Output, decision: Decision, specs: tuple[TensorSpec, ...]) -> Step | None:
        quantizer, proposal, spec = decision.quantizer, decision.proposal, decision.spec
        assert quantizer is not None
        assert proposal is not None
        if out.shape != spec.shape or len(specs) > 1 or out.transform is not None:
            spec = dataclasses.replace(spec, name=out.name, shape=out.shape, dtype=out.dtype, nbytes_stored=None)
            again = self.chooser.propose(quantizer, spec, decision.spec.name)
            if isinstance(again, Refusal):
                if again.instead is None:
                    self._refuse(out, again, specs)
                    return None
                if not any(refused.name == decision.spec.name for refused, _, _ in self.chooser.refused):
                    self.chooser.refused.append((spec, decision.scheme, again))
                again = again.instead
            proposal = again
            if isinstance(proposal.encoding, str):
                out = dataclasses.replace(out, dtype=proposal.encoding)
                self._redecide([self.decisions[s.name] for s in specs], "cast", decision.reason)
                action: Action = "derive" if out.transform is not None else "cast"
                return self._step(out, None, self._verdict(out, None), specs, action, decision.reason, decision.scheme)
        verdict = self._verdict(out, proposal)
        wanted = verdict.instead if isinstance(verdict, Refuses) else None
        if isinstance(verdict, Repacks):
            wanted = dataclasses.replace(proposal, encoding=verdict.encoding)
        if wanted is not None and isinstance(wanted.encoding, Encoding) and quantizer.accepts(spec, wanted.encoding):
            settled = self._verdict(out, wanted)
            if isinstance(settled, Holds):
                self._note_change(proposal, wanted)
                proposal, verdict = wanted, settled
        return self._step(out, proposal, verdict, specs, "quantize", decision.reason, decision.scheme, quantizer)

    def _place_finished(self, out: Output, first: Decision, specs: tuple[TensorSpec, ...]) -> Step | None:
        spec = first.spec
        assert spec.encoding is not None
        proposal = Proposal(spec.encoding, spec.activation)
        verdict = self._verdict(out, proposal)
        if isinstance(verdict, Refuses) and verdict.instead is not None:
            # Only what leaves the codes alone is done unasked: dropping the activation, say.
            other = self._verdict(out, verdict.instead)
            if verdict.instead.encoding == spec.encoding and isinstance(other, Holds | Repacks):
                self._note_change(proposal, verdict.instead)
                proposal, verdict = verdict.instead, other
        if out.transform is not None:
            verdict = Refuses(f"{out.transform.reason}: needs floats, and it is {spec.encoding}")
        if isinstance(verdict, Repacks) and not verdict.exact:
            self.notes.append(f"parameters of {spec.encoding} are rounded to {verdict.encoding}; codes do not change")
        if isinstance(verdict, Refuses):
            self.from_finished_file = True
            if self.on_unsupported == "dequantize":
                return self._dequantize(out, first, specs, f"{verdict.reason}; dequantized as asked")
            if self.on_unsupported == "requantize":
                return self._requantize(out, first, specs, verdict)
        return self._step(out, proposal, verdict, specs, "keep", first.reason)

    def _dequantize(self, out: Output, first: Decision, specs: tuple[TensorSpec, ...], reason: str) -> Step | None:
        self._redecide([first], "dequantize", reason)
        return self._step(out, None, self._verdict(out, None), specs, "dequantize", reason)

    def _requantize(self, out: Output, first: Decision, specs: tuple[TensorSpec, ...], refusal: Refuses) -> Step | None:
        chooser = self.chooser
        if not chooser.scheme:
            raise PlanError("--on-unsupported requantize needs the scheme to quantize with", hint="add --scheme NAME")
        rule = chooser.base_rule(first.spec)
        if rule is not None and rule.scheme == KEEP:  # as it would be of a float checkpoint
            return self._dequantize(out, first, specs, f"{refusal.reason}; a float here: {rule.reason or rule.label}")
        label, quantizer = chooser.bind(chooser.scheme, chooser.options, "--scheme")
        spec = dataclasses.replace(first.spec, encoding=None, activation=None)
        proposal = chooser.propose(quantizer, spec, spec.name)
        if isinstance(proposal, Refusal):
            self._refuse(out, dataclasses.replace(proposal, reason=f"{label}: {proposal.reason}"), ())
            return None
        reason = f"{refusal.reason}; requantized as asked"
        decision = Decision(first.spec, "quantize", reason, proposal, label, quantizer)
        self.decisions[first.spec.name] = decision
        return self._place_quantized(out, decision, specs)

    def _step(
        self,
        out: Output,
        proposal: Proposal | None,
        verdict: Verdict,
        specs: tuple[TensorSpec, ...],
        action: Action,
        reason: str,
        scheme: str = "",
        quantizer: Quantizer | None = None,
    ) -> Step | None:
        if isinstance(verdict, Refuses):
            self._refuse(out, verdict, specs)
            return None
        self.notes.extend(verdict.notes)
        parts = tuple(self.exporter.parts(out, verdict)) if self.exporter is not None else ()
        return Step(Placed(out, proposal, verdict, parts), specs, action, reason, scheme, quantizer)

    def _refuse(self, out: Output, refusal: Refuses | Refusal, specs: tuple[TensorSpec, ...]) -> None:
        chosen = next((s.name for s in specs if self.decisions[s.name].proposal is not None), "")
        self.refused.append(_Refused(out.name, refusal.reason, refusal.hint, chosen))

    def _verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        if self.exporter is not None:
            return self.exporter.verdict(out, proposal)
        encoding = proposal.encoding if proposal is not None else None
        return Holds("", encoding if isinstance(encoding, Encoding) else None)

    def _note_change(self, before: Proposal, after: Proposal) -> None:
        if before.encoding != after.encoding:
            self.notes.append(
                f"{before.encoding} is quantized as {after.encoding}: that is what {self.format_name} holds"
            )
        if before.activation is not None and after.activation is None:
            self.notes.append(f"{self.format_name} stores weights only: {before.activation} activations are left out")

    def _redecide(self, decisions: Iterable[Decision], action: Action, reason: str) -> None:
        for d in decisions:
            self.decisions[d.spec.name] = dataclasses.replace(d, action=action, reason=reason)


def _why(out: Output) -> str:
    return out.transform.reason if out.transform is not None else ""
