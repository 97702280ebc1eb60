"""Sections of the demo's page: how the SAE trained, conceptors, and the WiSE-FT curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipsteer.demo.pictures import Pictures
from clipsteer.ensembles.page import curve_charts, summary_table
from clipsteer.ensembles.robustness import averages
from clipsteer.report.axes import Axis
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Line
from clipsteer.report.page import Html, card, cards, code, figures, grid, stats, table, text

_CE_GAP = 0.1


def percent(value: float) -> str:
    """A share as text, with a tenth of a point."""
    return f"{100 * value:.1f}\u00a0%"


def training(
    sae: Any, found: Mapping[str, Any], history: Sequence[Mapping[str, float]]
) -> list[Html]:
    """``found`` is all figures of the demo, ``history`` what SAE training logged."""
    steps = [h["step"] for h in history]
    unexplained = Line("FVU", steps, [h["fvu"] for h in history])
    dead = Line("dead", steps, [100 * h["dead"] for h in history])
    curves = grid(
        Chart("Variance unexplained", unexplained, x="step", y=Axis("share of variance", low=0)),
        Chart("Dead features", dead, x="step", y=Axis("% of features", low=0)),
    )
    by_text = found["named_by"] == "text"
    score = "top1" if by_text else "linear"
    rows = []
    for group, row in found["sae"]["evaluation"].items():
        rows.append(
            [
                group,
                row["images"],
                f"{row['ev']:.3f}",
                f"{row['l0']:.1f}",
                percent(row["dead"]),
                _or_dash(row.get("ce_recovered") if _hurts(row) else None),
                *(_or_dash(row.get(f"{score}_{way}")) for way in ("clean", "sae", "zero")),
            ]
        )
    return [
        *_what(sae, bool(history), curves),
        table(
            [
                "images",
                "count",
                "explained variance",
                "L0",
                "silent features",
                "CE recovered",
                "top-1",
                "with SAE",
                "with zeros",
            ],
            rows,
            caption="Reconstruction, on a part of each group. The last columns replace every token "
            "by its reconstruction, or by zero: CE recovered is the share of the zero-shot "
            "cross-entropy that survives "
            f"(– where it is hardly lower than with zeros, by less than {_CE_GAP:.0%}), top-1 the "
            "accuracy among the group's names, "
            + ("with one prompt each." if by_text else "of a linear probe, five-fold."),
        ),
    ]


def _what(sae: Any, here: bool, curves: Html) -> list[Html]:
    """The SAE in words, and how it was trained where that was done ``here``."""
    size = f"{sae.d_sae} features over tokens of width {sae.d_in}"
    if not here:
        words = "trained before, perhaps on some of these images"
        return [text(f"{size}: {sae.architecture}, {words}.")]
    words = (
        f"{size}, of which each token may use {sae.k}: the top-k autoencoder of Gao et al. 2024. "
        "It learns from the first group of images alone."
    )
    return [text(words), curves]


def _hurts(row: Mapping[str, Any]) -> bool:
    """Whether the model knows clearly more than it does without the tokens; else CE recovered
    divides by noise."""
    return "ce_zero" in row and row["ce_clean"] <= (1 - _CE_GAP) * row["ce_zero"]


def _or_dash(value: float | None) -> str:
    return "–" if value is None else percent(value)


def conceptors(
    pictures: Pictures, found: Mapping[str, Any], hook_point: str, saved: Path
) -> list[Html]:
    """``found`` is what ``demo_conceptors.measure`` gives, ``saved`` the file of the conceptors."""
    if "skipped" in found:
        return [text(found["skipped"])]
    what = found["what"]
    rows = found["conceptors"]
    apart = found["told_apart"]
    shown = found["shown"]
    other = 0 if shown else 1
    pair = f"{rows[shown]['name']} AND NOT {rows[other]['name']}"
    return [
        text(
            "A conceptor is a soft projection, made from the tokens of some images: directions "
            "that these images use much pass nearly unchanged, the others are damped. Conceptors "
            "combine as sets do: NOT keeps what was damped, AND what both keep, OR what either "
            f"keeps (Jaeger 2014; Postmus & Abreu 2024). Here each {what} has one, made from the "
            "images of the first group. The quota is the share of all directions "
            f"that passes; the aperture sets it, and is one for all: α = {found['aperture']:.3g}, "
            "by which a direction of average energy passes by half."
        ),
        text(
            "Which held-out images each keeps most and least, as ‖Ch‖²/‖h‖² over the tokens "
            "against the same of a conceptor of all images together (quota "
            f"{found['quota_everything']:.2f}). Taking for each of the {found['held_out']} images "
            f"the {what} whose conceptor keeps most in this sense is right for "
            f"{percent(apart['accuracy'])}; the largest {what} makes up "
            f"{percent(apart['largest_share'])}."
        ),
        cards(*(_kept(pictures, row, found) for row in rows)),
        text(
            f"Steering: every token of {found['steered_images']} held-out images of all kinds "
            "goes through a conceptor, and the model names what comes out. The table gives the "
            f"probability that falls on names of the {what} in the first column, mean over the "
            "images. Compare with the column of the conceptor of all images, which shows what "
            "damping alone does."
        ),
        _effects(found),
        _examples(pictures, found),
        code(
            "import clipsteer\n\n"
            f"conceptors = clipsteer.Conceptor.load({str(saved)!r})\n"
            f"wanted = conceptors[{shown}] & ~conceptors[{other}]  # {pair}\n"
            f"steering = clipsteer.ConceptorSteering(wanted)  # for clipsteer.steer, at "
            f"{hook_point!r}"
        ),
    ]


def _kept(pictures: Pictures, row: Mapping[str, Any], found: Mapping[str, Any]) -> Html:
    def caption(name: str, ratio: float) -> str:
        # drawings are all of one style here: its name at the end would only take room
        if found["minus"] == "style":
            name = name.rpartition(" (")[0]
        return f"{name}, ×{ratio:.2f}"

    def drawings(pairs: Sequence[tuple[int, float]]) -> Html:
        items = []
        for i, ratio in pairs:
            items.append((pictures.thumb(i, 96), caption(pictures.names[i], ratio)))
        return figures(items, size="4.6rem")

    own = f"{row['most_of_its_own']} of these {len(row['most'])} are of this {found['what']}"
    return card(
        row["name"],
        text(f"From {row['images']} images; quota {row['quota']:.3f}.", css="note"),
        text(f"Kept most ({own}):"),
        drawings(row["most"]),
        text("Kept least:"),
        drawings(row["least"]),
    )


def _minus(found: Mapping[str, Any]) -> str:
    return "style" if found["minus"] == "style" else "the others"


def _effects(found: Mapping[str, Any]) -> Html:
    plain = [found["probability"][way] for way in ("unsteered", "everything")]
    steered = ("itself", "and_not", "not")
    rows = found["conceptors"]
    body = []
    for k, row in enumerate(rows):
        ways = [*plain, *(row["effect"][way] for way in steered)]
        body.append([row["name"], *(percent(way["mass"][k]) for way in ways)])
    right = [way["right_name"] for way in plain]
    for way in steered:
        right.append(sum(row["effect"][way]["right_name"] for row in rows) / len(rows))
    body.append(["images named right", *map(percent, right)])
    what = found["what"]
    if found["minus"] == "style":
        minus = "Style is a conceptor of the differences between two drawings of one thing."
    else:
        minus = f"The others are a conceptor of the images of every other {what}."
    return table(
        [
            f"probability of the {what}",
            "unsteered",
            "conceptor of all images",
            f"the {what}'s own",
            f"own AND NOT {_minus(found)}",
            "NOT its own",
        ],
        body,
        f"{minus} The last row is the share of images that still get their own name, among all "
        "names; in the last three columns it is the mean over the conceptors. The images below "
        "are picked evenly, not by their effect.",
    )


def _examples(pictures: Pictures, found: Mapping[str, Any]) -> Html:
    name = found["conceptors"][found["shown"]]["name"]

    def words(name: str, p: float) -> str:
        return f"{name}, {p:.0%}"

    def rows(way: str) -> list[list[Any]]:
        body = []
        for example in found["examples"][way]:
            row = example["row"]
            image = figures([(pictures.thumb(row), "", pictures.names[row])], size="3.2rem")
            seen = [words(*example[when]) for when in ("before", "after")]
            body.append([image, pictures.names[row], *seen])
        return body

    return cards(
        card(
            f"Keep {name}, on other images",
            table(["image", "it is", "seen as", "steered"], rows("itself"), words=True),
        ),
        card(
            f"NOT {name}, on images of that {found['what']}",
            table(["image", "it is", "seen as", "steered"], rows("not"), words=True),
        ),
    )


def wise_ft(found: Mapping[str, Any]) -> list[Html]:
    """``found`` is what ``demo_wise_ft.measure`` gives."""
    intro = text(
        "Fine-tuning makes a model better at what it is tuned on, and often worse at everything "
        "else. WiSE-FT (Wortsman et al. 2022) averages the weights of before and after, tensor by "
        "tensor: (1 − α) · zero-shot + α · fine-tuned. Often some α in between is better than "
        "both ends, at no cost when the model runs."
    )
    if "skipped" in found:
        return [intro, text(found["skipped"])]
    rows = found["rows"]
    weight = [row for row in rows if row["method"] == "weight"]
    line = {row["alpha"]: row for row in averages(weight)}
    names = list(dict.fromkeys(row["set"] for row in weight))
    widest = max((row["high"] - row["low"]) / 2 for row in weight)
    cells = {(row["alpha"], row["set"]): _accuracy(row) for row in weight}
    body = [[f"{alpha:g}", *(cells[alpha, name] for name in names)] for alpha in line]
    shifted = [name.capitalize() for name in names[1:]]
    own = found["style"].capitalize()
    middle = []
    if 0.5 in line:
        middle.append(("α = 0.5, other styles", percent(line[0.5]["shifted"])))
    return [
        intro,
        text(
            f"Here EmojiCLIP, which was trained on {' and '.join(shifted)} drawings, is tuned to "
            f"{own}, a style new to it: {found['training_concepts']} things in 30 classes, "
            f"{found['epochs']} epochs. Tested are the drawings of {found['test_concepts']} other "
            f"things, which it saw in no style: in {own} (reference), and in "
            f"{' and '.join(shifted)} (shifted)."
        ),
        stats(
            [
                ("before tuning, other styles", percent(line[0.0]["shifted"])),
                *middle,
                ("after tuning, other styles", percent(line[1.0]["shifted"])),
                (
                    f"before and after, {own}",
                    f"{percent(line[0.0]['reference'])} → {percent(line[1.0]['reference'])}",
                ),
            ]
        ),
        text(
            "In the left chart a line runs from before tuning (○) to after (■): further right is "
            f"better on {own}, further up is better on the other styles. The axes are in log "
            "odds, which stretch the scale towards 0 and 100 %. The output-space ensemble "
            "averages the answers of both models instead, and has to run both."
        ),
        grid(*curve_charts(rows)),
        text(_verdict(rows)),
        summary_table(rows, None),
        table(
            ["α", *names],
            body,
            "Accuracy in % with 95 % Clopper–Pearson intervals, one fine-tuning seed "
            f"({found['seed']}). The intervals reach up to {100 * widest:.0f} points either way: "
            "read the shape, not the last digit. Every style, three seeds, and gains over both "
            "ends: benchmarks/results/wise_ft_emoji in the repository, made by "
            "benchmarks/wise_ft.py. For your own models and data: clipsteer wise-ft curve.",
        ),
    ]


def _accuracy(row: Mapping[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f}–{100 * row['high']:.1f})"


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many alphas beat both ends on the shifted sets, by both measures."""
    measures = {"accuracy": "accuracy", "balanced": "balanced accuracy (the mean over classes)"}
    parts = []
    for measure, name in measures.items():
        line = {}
        for row in averages(rows, measure):
            if row["method"] == "weight":
                line[row["alpha"]] = row["shifted"]
        inner = [alpha for alpha in line if 0 < alpha < 1]
        above = [alpha for alpha in inner if line[alpha] > max(line[0.0], line[1.0])]
        which = ""
        if 0 < len(above) < len(inner):
            which = f" (α = {', '.join(f'{alpha:g}' for alpha in above)})"
        parts.append(f"by {name} {len(above)} of the {len(inner)} averages in between{which}")
    return f"What beats both ends on the mean of the other styles, in this run: {'; '.join(parts)}."
