"""Make the bundled texts from public-domain books.

    python benchmarks/make_demo_text.py --books ../shared/data/corpus/books

Calibration: passages of the books the demo model was trained on. Evaluation: excerpts of books by other authors.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "src" / "secateur" / "assets"


def read(file: Path) -> list[dict[str, str]]:
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def excerpt(text: str, length: int, start: int) -> str:
    """About `length` characters from `start` on, from one paragraph's beginning to another's end."""
    begin = text.find("\n", start) + 1
    end = text.find("\n", begin + length)
    return text[begin : end if end > 0 else None].strip()


def write(name: str, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (ASSETS / name).write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{name}: {len(rows)} rows, {len(text):,} characters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    args = parser.parse_args()
    generator = random.Random(0)
    passages = generator.sample(read(args.books / "calibration_512.jsonl.xz"), 64)
    write("demo-calibration.jsonl.xz", [{"text": excerpt(p["text"], 8000, 0)} for p in passages])
    rows = []
    for book in read(args.books / "valid.jsonl.xz"):
        for part in range(1, 5):
            source = f"{book['author']}, {book['title']}"
            rows.append({"source": source, "text": excerpt(book["text"], 6000, part * len(book["text"]) // 5)})
    write("demo-eval.jsonl.xz", rows)


if __name__ == "__main__":
    main()
