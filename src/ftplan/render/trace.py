"""A traced job on the screen, as markdown, and its timeline as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftplan.units import format_bytes

__all__ = [
    "render",
    "render_markdown",
    "render_modules",
    "render_reading",
    "render_svg",
    "render_timeline",
]


def _size(count: int | None) -> str:
    return "-" if count is None else format_bytes(count)


def _share(traced: int, predicted: int | None) -> str:
    if predicted is None or not traced:
        return ""
    return f"{(predicted - traced) / traced:+.1%}"


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    allocated = summary["allocated_bytes"]
    rows = [("allocated", allocated["traced"], allocated["predicted"])]
    rows += [(f"  {p['name']}", p["traced"], p["predicted"]) for p in summary["phases"]]
    rows += [(f"  at peak: {t['name']}", t["traced"], t["predicted"]) for t in summary["terms"]]
    return [(name, _size(a), _size(b), _share(a, b)) for name, a, b in rows]


def render(summary: Mapping[str, Any]) -> str:
    """Truth beside prediction, one line each."""
    rows = [("", "traced", "predicted", "error"), *_rows(summary)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  "
        f"{row[3]:>{widths[3]}}".rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *_footer(summary)]) + "\n"


def _footer(summary: Mapping[str, Any]) -> list[str]:
    phase = summary["peak_phase"]
    model = summary["model"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    lines = [
        f"peak in {phase['traced']}"
        + (f" (predicted: {phase['predicted']})" if phase["predicted"] else ""),
        f"{model['total_params']:,} parameters, {model['trainable_params']:,} trained",
        f"second step on fake tensors; {versions}",
    ]
    if summary.get("note"):
        lines.append(str(summary["note"]))
    return lines


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The same as a markdown table."""
    lines = ["| | traced | predicted | error |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name.strip()} | {a} | {b} | {error} |" for name, a, b, error in _rows(summary)]
    return "\n".join([*lines, "", *(f"{line}  " for line in _footer(summary))]) + "\n"


def render_modules(rows: Sequence[Mapping[str, Any]], most: int = 30) -> str:
    """What each module holds at the peak, largest first."""
    shown = rows[:most]
    width = max((len(row["module"]) for row in shown), default=0)
    lines = [
        f"{row['module']:<{width}}  {row['term']:<18}  {_size(row['bytes']):>10}" for row in shown
    ]
    rest = sum(row["bytes"] for row in rows[most:])
    if rest:
        lines.append(f"{'(the rest)':<{width}}  {'':<18}  {_size(rest):>10}")
    return "\n".join(lines) + "\n"


def render_timeline(timeline: Mapping[str, Any], width: int = 80, height: int = 12) -> str:
    """Live bytes over the second step as a chart of characters."""
    columns = max(20, width - 12)
    values = _resampled(timeline["live_bytes"], columns)
    top = max(values) or 1
    lines = []
    for row in range(height, 0, -1):
        label = _size(top * row // height) if row in (height, height // 2) else ""
        cells = (_cell(value * height / top - (row - 1)) for value in values)
        lines.append(f"{label:>10} |{''.join(cells)}".rstrip())
    lines.append(f"{'0':>10} +{'-' * columns}")
    names = [" "] * columns
    for phase in timeline["phases"]:
        at = phase["at"] * columns // len(timeline["live_bytes"])
        for offset, letter in enumerate("|" + phase["name"]):
            if at + offset < columns:
                names[at + offset] = letter
    lines.append(" " * 12 + "".join(names).rstrip())
    return "\n".join(lines) + "\n"


def _cell(filled: float) -> str:
    return "#" if filled >= 0.75 else ("." if filled >= 0.25 else " ")


def _resampled(values: Sequence[int], columns: int) -> list[int]:
    count = len(values)
    return [
        max(
            values[i * count // columns : max(i * count // columns + 1, (i + 1) * count // columns)]
        )
        for i in range(columns)
    ]


def render_svg(timeline: Mapping[str, Any], title: str) -> str:
    """Live bytes over the second step as an SVG picture that needs no font and no script."""
    wide, tall, left, bottom = 900, 320, 80, 40
    values = timeline["live_bytes"]
    top = max(values) or 1
    step = (wide - left - 20) / max(1, len(values))

    def x(index: float) -> float:
        return round(left + index * step, 1)

    def y(value: float) -> float:
        return round(tall - bottom - value / top * (tall - bottom - 40), 1)

    outline = [f"{x(0)},{y(0)}"]
    for index, value in enumerate(values):
        outline += [f"{x(index)},{y(value)}", f"{x(index + 1)},{y(value)}"]
    outline.append(f"{x(len(values))},{y(0)}")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" role="img" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{_escaped(title)}</title>",
        f'<text x="{left}" y="20" font-size="14">{_escaped(title)}</text>',
        f'<polygon points="{" ".join(outline)}" fill="#4c78a8" fill-opacity="0.7"/>',
    ]
    for share in (0, 0.5, 1):
        value = int(top * share)
        parts.append(
            f'<line x1="{left}" x2="{wide - 20}" y1="{y(value)}" y2="{y(value)}" '
            'stroke="#999" stroke-width="0.5"/>'
            f'<text x="{left - 6}" y="{y(value) + 4}" text-anchor="end">{_size(value)}</text>'
        )
    for phase in timeline["phases"]:
        at = x(phase["at"])
        parts.append(
            f'<line x1="{at}" x2="{at}" y1="30" y2="{tall - bottom}" stroke="#333" '
            'stroke-dasharray="3 3"/>'
            f'<text x="{at + 4}" y="{tall - bottom + 16}">{_escaped(phase["name"])}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def render_reading(reading: Mapping[str, Any], *, markdown: bool = False) -> str:
    """What a job took on a GPU."""
    rows = [("allocated", _size(reading.get("allocated_bytes")))]
    rows += [(f"  {name}", _size(peak)) for name, peak in reading.get("phases", {}).items()]
    rows += [
        ("reserved", _size(reading.get("reserved_bytes"))),
        ("device", _size(reading.get("device_bytes"))),
        ("host", _size(reading.get("host_bytes"))),
    ]
    if reading.get("step_seconds") is not None:
        rows.append(("step", f"{reading['step_seconds']:.3f} s"))
    where = reading["where"]
    versions = ", ".join(f"{name} {version}" for name, version in reading["versions"].items())
    foot = [f"{where['gpu']}, CUDA {where['cuda']}; {versions}"]
    if reading.get("oom"):
        foot.insert(0, f"out of memory: {reading.get('message', '')}")
    if markdown:
        lines = ["| | measured |", "| --- | ---: |"]
        lines += [f"| {name.strip()} | {value} |" for name, value in rows]
    else:
        lines = [f"{name:<14}{value:>12}" for name, value in rows]
    return "\n".join([*lines, "", *foot]) + "\n"
