"""What was measured of a finished run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from monoquant_core.cli.render import decibels, duration, exact, fields, notes, out, plural, size
from monoquant_core.report import Report


def show_reports(reports: Sequence[Report], *, json: bool) -> None:
    """Print sizes on disk, error, time and memory of the outputs of one run, all as measured."""
    from monoquant_core.cli.render import out_json

    if json:
        found = [report_dict(report) for report in reports]
        out_json(found[0] if len(found) == 1 else {"outputs": found})
        return
    for number, report in enumerate(reports):
        if number:
            out()
        _show_report(report, [] if number < len(reports) - 1 else _cost(report))


def _cost(report: Report) -> list[tuple[str, str]]:
    """Time and memory of a run, whatever it wrote."""
    rate = report.source_bytes * (1 - report.resumed) / report.seconds if report.seconds else 0.0
    peak = max(0, report.peak_bytes - report.start_bytes)
    where = plural(report.threads, "thread") if report.device == "cpu" else report.device
    known = report.peak_bytes > report.earlier_bytes  # what ran before it took more otherwise, and it less than that
    taken = f"{'' if known else 'at most '}{size(peak)}"
    predicted = f"{size(report.predicted_bytes)} predicted"
    resumed = f"{int(100 * report.resumed)} % was done by a run that was interrupted"
    return [
        *([("resumed", resumed)] if report.resumed else []),
        ("time", f"{duration(report.seconds)}, {size(rate)}/s, {where}"),
        ("memory", f"{taken} at its peak above the start's {size(report.start_bytes)}; {predicted}"),
    ]


def _show_report(report: Report, cost: Sequence[tuple[str, str]]) -> None:
    ratio = report.source_bytes / report.nbytes if report.nbytes else 0.0
    change = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger" if ratio else ""
    changed = [t for t in report.tensors if t.noise > 0]
    pairs = [
        ("size", f"{size(report.source_bytes)} -> {exact(report.nbytes)}, {change}"),
        ("files", "\n".join(f"{path or report.destination.name}  {size(n)}" for path, n in shown_files(report.files))),
    ]
    layouts = Counter(t.layout for t in report.tensors)
    held = ", ".join(f"{count:,} {layout}" for layout, count in layouts.most_common())
    pairs.append(("weights", f"{report.bits_per_weight:.2f} bits each, scales included: {held}"))
    if changed:
        pairs.append(("SQNR", f"{decibels(report.sqnr_db)} over {plural(len(changed), 'changed tensor')}"))
        worst = [
            f"{decibels(t.sqnr_db)}  {t.name}  ({t.layout}, largest error {t.max_error:.3g})" for t in report.worst()
        ]
        pairs.append(("worst", "\n".join(worst)))
    else:
        pairs.append(("SQNR", "exact: no value changed"))
    out(f"wrote {report.destination}")
    fields([*pairs, *cost])
    notes(report.notes)


def shown_files(files: Mapping[str, int], limit: int = 6) -> list[tuple[str, int]]:
    """The files, the largest first; many small ones as one line."""
    ordered = sorted(files.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) <= limit:
        return ordered
    rest = ordered[limit - 1 :]
    return [*ordered[: limit - 1], (f"and {len(rest)} more", sum(n for _, n in rest))]


def report_dict(report: Report) -> dict[str, Any]:
    """JSON form of a report."""
    return {
        "destination": str(report.destination),
        "files": dict(report.files),
        "source_bytes": report.source_bytes,
        "bytes": report.nbytes,
        "bits_per_weight": report.bits_per_weight,
        "sqnr_db": report.sqnr_db,
        "seconds": report.seconds,
        "start_bytes": report.start_bytes,
        "peak_bytes": report.peak_bytes,
        "earlier_bytes": report.earlier_bytes,
        "predicted_bytes": report.predicted_bytes,
        "resumed": report.resumed,
        "threads": report.threads,
        "device": report.device,
        "tensors": [
            {
                "name": t.name,
                "action": t.action,
                "layout": t.layout,
                "elements": t.numel,
                "bytes": t.nbytes,
                "sqnr_db": t.sqnr_db,
                "max_error": t.max_error,
            }
            for t in report.tensors
        ],
        "notes": list(report.notes),
    }
