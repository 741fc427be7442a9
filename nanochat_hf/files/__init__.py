"""Data files: which files a path names, and their rows as they were written.

- `endings`: the ending of a name → how the file is read and unpacked
- `listing`: a path, a pattern, a folder or a Hub name → files by split
- `splits`: "train[:90%]", start and rows → ranges of rows
- `text`: JSON lines, JSON, CSV and TSV → one line of JSON a row; nothing is guessed about types
- `tables`: parquet and Arrow → rows without the keys that Arrow had to fill in
- `shards`: files and ranges → the shards of a stream, which processes and workers share out
"""
