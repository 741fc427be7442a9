"""Check the records in docs/records and rebuild the pages that come from them (python -m scripts.records [--check]).

The pages are docs/results.md, docs/negative_results.md and the figures in each record's README.md. Each fault is one
line: which record, what is wrong, what to do. `--check` writes nothing and fails where a page is not what the records
make of it.
"""

import argparse
import sys
from pathlib import Path

from nanochat_hf.cli.record_parts import METRICS, Claim, Record, claim_text, number, read_all

FIGURES = "<!-- figures: python -m scripts.records writes what follows from table.json -->"
PAGE = "<!-- python -m scripts.records writes this page from docs/records; edits here are lost -->"


def cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of the given cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in lines) + "\n"


def figures_section(record: Record) -> str:
    """What stands below the mark in a record's README: its tables for reading."""
    parts = [FIGURES + "\n\n## Figures\n"]
    for name, table in record.tables.items():
        if name == METRICS:
            parts.append(f"[metrics.jsonl](metrics.jsonl): {len(table.rows)} entries of the run.\n")
            continue
        header = [
            f"{c.replace('_', ' ')} ({unit})" if unit else c.replace("_", " ") for c, unit in table.columns.items()
        ]
        rows = [[number(value) for value in row] for row in table.rows]
        parts.append(f"{table.about}:\n\n{markdown_table(header, rows)}")
    return "\n".join(parts)


def readme(record: Record) -> str:
    """A record's README with its figures as table.json has them."""
    words = (record.folder / "README.md").read_text().split(FIGURES)[0].rstrip()
    return f"{words}\n\n{figures_section(record)}"


def newest(records: list[Record]) -> dict[tuple[str, str], tuple[Record, Claim]]:
    """{(topic, claim): the newest record that makes it}, in the order of topics and claims."""
    found: dict[tuple[str, str], tuple[Record, Claim]] = {}
    for record in sorted(records, key=lambda r: (r.date, r.folder.name)):
        for claim in record.claims:
            found[claim.topic, claim.claim] = record, claim
    return dict(sorted(found.items()))


def results_page(records: list[Record]) -> str:
    """docs/results.md: each claim by its newest record, then all records."""
    lines = [
        PAGE,
        "",
        "# Results",
        "",
        "The newest record of each claim. A range spans several cards or runs. Words: [glossary](glossary.md).",
        "",
    ]
    lines += [
        "What did not help: [negative results](negative_results.md). How to make one: [records](records/README.md).",
        "",
    ]
    header, found = ["claim", "figures", "hardware", "date", "commit", "command"], newest(records)
    for topic in dict.fromkeys(topic for topic, _ in found):
        rows = []
        for (_, text), (record, claim) in ((key, value) for key, value in found.items() if key[0] == topic):
            link = f"records/{record.folder.name}"
            commit = f"`{record.environment.commit[:7]}`" if record.environment.commit else "–"
            rows.append([f"[{text}]({link}/README.md)", claim_text(claim, record.tables), record.environment.hardware(),
                         f"{record.date:%Y-%m-%d}", commit, f"[command]({link}/command)"])  # fmt: skip
        lines += [f"## {topic}", "", markdown_table(header, rows)]
    lines += ["## All records", "", "From the newest to the oldest.", ""]
    ordered = sorted(records, key=lambda r: (r.date, r.folder.name), reverse=True)
    rows = [
        [f"{r.date:%Y-%m-%d}", f"[{r.title}](records/{r.folder.name}/README.md)", r.environment.hardware()]
        for r in ordered
    ]
    return "\n".join(lines) + "\n" + markdown_table(["date", "record", "hardware"], rows)


def negative_page(records: list[Record]) -> str:
    """docs/negative_results.md: what was tried and did not help, by record."""
    lines = [
        PAGE,
        "",
        "# Negative results",
        "",
        "What was tried and did not help, so that nobody has to try it again without a reason.",
        "",
    ]
    for record in sorted(records, key=lambda r: (r.date, r.folder.name), reverse=True):
        if record.negative:
            lines += [f"## {record.title}", "", f"{record.date:%Y-%m-%d}, {record.environment.hardware()}: "
                      f"[record](records/{record.folder.name}/README.md).", ""]  # fmt: skip
            lines.append(markdown_table(["tried", "what came of it"], [[n.tried, n.got] for n in record.negative]))
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Check, then write the pages, or with --check compare them. Exit code 1 where there is a fault."""
    parser = argparse.ArgumentParser(description="Check the records and rebuild the pages that come from them.")
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="folder of records/, results.md and negative_results.md"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not up to date")
    args = parser.parse_args(argv)
    if not (args.docs / "records").is_dir():
        parser.error(f"--docs {args.docs} has no folder records; start in the repository's root, or name the folder")
    records, faults = read_all(args.docs / "records")
    if not faults:
        pages = {
            args.docs / "results.md": results_page(records),
            args.docs / "negative_results.md": negative_page(records),
        }
        pages |= {record.folder / "README.md": readme(record) for record in records}
        for path, text in pages.items():
            if path.is_file() and path.read_text() == text:
                continue
            if args.check:
                faults.append(
                    f"{path.relative_to(args.docs)}: not what the records make of it; run python -m scripts.records"
                )
            else:
                path.write_text(text)
                print(f"wrote {path}")
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    if faults:
        sys.exit(1)
    print(f"{len(records)} records, all whole")


if __name__ == "__main__":
    main()
