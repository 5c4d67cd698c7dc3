"""The card: may this set be shared? One answer, what it rests on, and what nobody looked at.

Three forms of one document: card.json for machines, card.md for a repository, card.html for people; the last holds
everything itself, runs no script and asks no server for anything. Images are drawn only on request and never from a
restricted set.
"""

import base64
import io
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from lookalike.files import write_atomically
from lookalike.verdict import EvidenceError

NAMES = {
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "vendi_ratio": "diversity (Vendi score, ratio to real)",
    "authenticity": "authenticity",
    "closer_than_held_out": "nearer to a training image than half of the held-out images are",
    "gan_leaks_pixels": "nearest released image, pixels",
    "pgan_pairwise_pixels": "nearest over median, pixels",
    "pgan_distribution_pixels": "neighbour count, pixels",
    "aligned_similarity": "best likeness after shifts and flips",
    "gan_leaks_features": "nearest released image, features",
    "pgan_pairwise_features": "nearest over median, features",
    "calibrated_features": "nearest released against nearest other image, features",
    "domias_features": "density ratio (DOMIAS), features",
    "discriminator_features": "released against other images, linear classifier",
    "copies": "copies",
    "copies_share": "flagged as copies, beyond chance",
    "frechet_gap": "Fréchet gap",
    "kernel_gap": "kernel gap",
    "copies_flagged": "copies flagged",
    "logan_white_box": "LOGAN, white box",
    "gan_leaks_partial_black_box": "GAN-Leaks, partial black box",
    "gan_leaks_white_box": "GAN-Leaks, white box",
    "latent_projection": "latent projection",
    "loss": "the loss alone",
    "lira": "LiRA",
    "lira_offline": "LiRA, offline",
    "rmia": "RMIA",
    "rmia_offline": "RMIA, offline",
    "attack_auc": "strongest attack, AUC",
    "attack_tpr_at_1pct_fpr": "strongest attack, found at 1 % false alarms",
    "coverage_kept": "coverage kept",
    "utility_kept": "use kept",
    "auroc": "AUROC of a classifier",
    "balanced_accuracy": "balanced accuracy of a classifier",
}
ANSWERS = {
    "pass": "Nothing speaks against sharing, within what was tested.",
    "fail": "Not to be shared as it is, or not worth it: see which criterion fails.",
    "cannot tell": "The evidence does not decide.",
}


def write(evidence, folder, draw=False):
    """card.json, card.md and card.html in `folder`, which is made if needed; returns their paths.

    draw: put the most alike pairs of images on the HTML page; refused where a set is restricted.
    """
    document, folder = evidence.document, Path(folder)
    check_drawing(draw, any(described["restricted"] for described in document["sets"].values()))
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        "card.json": json.dumps(document, indent=1, allow_nan=False),
        "card.md": markdown(document),
        "card.html": html(document, evidence.pairs if draw else ()),
    }
    for name, text in pages.items():
        write_atomically(folder / name, text.encode())
    return [folder / name for name in pages]


def check_drawing(draw, restricted):
    """Refuses to draw what is restricted."""
    if draw and restricted:
        raise EvidenceError("One of the sets is restricted, so no image of it is drawn: leave out --draw.")


def markdown(document):
    """The card as Markdown."""
    return template("card.md.jinja", escape=False).render(**_words(document))


def html(document, pairs=()):
    """The card as one page of HTML; `pairs`: (released image, training image) of the worst records, in their order."""
    check_drawing(bool(pairs), any(described["restricted"] for described in document["sets"].values()))
    drawn = [(png(released), png(training)) for released, training in pairs]
    return template("card.html.jinja", escape=True).render(**_words(document), pairs=drawn, svg=_interval_svg)


def tables(document):
    """{title: rows of plain cells}, for a terminal."""
    criteria = [
        {"criterion": NAMES[name], "value": _number(c["value"]), "95 % interval": _span(c["interval"]),
         "limit": f"{'at most' if c['passes'] == 'below' else 'at least'} {_number(c['limit'])}", "": c["verdict"]}
        for name, c in document["criteria"].items()
    ]  # fmt: skip
    attacks = [
        {"attack": NAMES[name], "AUC": _number(a["auc"]), "interval": _span(a["interval"]),
         "found at 1 % false alarms": _number(a["tpr_at_1pct_fpr"]), "no leak": _number(a["control"]["no leak"]["auc"]),
         "planted": _number(a["control"]["planted copies"]["auc"]), "believed": a["believed"]}
        for name, a in document["attacks"].items()
    ]  # fmt: skip
    measures = [
        {"measure": m.get("name") or NAMES[name], "value": _number(m["value"]), "interval": _span(m["interval"]),
         "better": m["direction"], "held-out real": _number(m["control"] and m["control"]["value"]),
         "worth nothing": _number(m.get("baseline") and m["baseline"]["value"])}
        for name, m in document["measures"].items()
    ]  # fmt: skip
    found = {"Criteria": criteria, "Attacks": attacks, "Measures": measures}
    return {title: rows for title, rows in found.items() if rows}


def _words(document):
    return {"d": document, "names": NAMES, "answer": ANSWERS[document["verdict"]], "num": _number, "span": _span}


def template(name, escape):
    environment = Environment(
        autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string((files("lookalike") / "templates" / name).read_text("utf-8"))


def _number(value):
    """Three decimals below ten, three digits above; a dash for what there is not."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _span(interval):
    return "–" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}"


def png(image):
    """An image (C, H, W) as a data URL, enlarged without smoothing; of other than 1 or 3 channels the middle one."""
    image = image if image.shape[0] in (1, 3) else image[image.shape[0] // 2][None]
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0)).squeeze()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _interval_svg(value, interval, low=0.0, high=1.0, mark=0.5, width=140):
    """A number with its interval on a line from `low` to `high`, `mark` ticked."""

    def x(v):
        return 4 + (width - 8) * (min(max(v, low), high) - low) / (high - low)

    label = f"{_number(value)}, {_span(interval)}"
    parts = [
        f'<svg viewBox="0 0 {width} 16" width="{width}" height="16" role="img" aria-label="{label}">',
        f'<line class="axis" x1="4" x2="{width - 4}" y1="8" y2="8"/>',
        f'<line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="2" y2="14"/>',
        f'<line class="range" x1="{x(interval[0]):.1f}" x2="{x(interval[1]):.1f}" y1="8" y2="8"/>' if interval else "",
        f'<circle cx="{x(value):.1f}" cy="8" r="3.5"/></svg>',
    ]
    return "".join(parts)
