"""Which documents share a row. Pure; no torch."""

from bisect import bisect_right, insort


def plan_rows(lengths, capacity):
    """Best fit, longest first: plan_rows([5, 3, 2], capacity=5) → [[0], [1, 2]]. No index is lost.

    O(n·capacity/64): an integer's bits say which free spaces exist. ValueError for a length over the capacity.
    """
    rows, free, existing = [], [[] for _ in range(capacity + 1)], 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ValueError(
                f"lengths[{index}]={length} must be between 1 and the row's capacity {capacity}; cut or drop it first"
            )
        fitting = existing >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = free[space].pop()
            if not free[space]:
                existing &= ~(1 << space)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if space > length:
            free[space - length].append(row)
            existing |= 1 << (space - length)
    return rows


def pack_text(documents, capacity, mode, bos):
    """Full rows from a window of documents: best fit; where nothing fits, the shortest document is cut to fill the row.

    `mode` "crop" drops the rest of a cut document, as the reference; "keep" puts it back behind a `bos`, and loses no token.
    Rows are made until what is left would not fill one, so no document waits longer than to the next window.
    pack_text([[0, 1, 2], [0, 3, 4, 5]], 5, "keep", 0) → rows [[[0, 3, 4, 5], [0]]], rest [[0, 1, 2]]. Documents may be any sequences
    with a length and slices. Searching a place takes O(log n) of n documents.
    """
    queue = sorted((len(d), serial) for serial, d in enumerate(documents))
    held, total, rows = dict(enumerate(documents)), sum(map(len, documents)), []
    serial = len(held)
    while total >= capacity:
        row, space = [], capacity
        while space:
            place = bisect_right(queue, (space, serial)) - 1
            length, taken = queue.pop(max(place, 0))
            document = held.pop(taken)
            total -= length
            if length > space:
                if mode == "keep":
                    rest = [bos, *document[space:]]
                    held[serial] = rest
                    insort(queue, (len(rest), serial))
                    total, serial = total + len(rest), serial + 1
                document = document[:space]
            row.append(document)
            space -= len(document)
        rows.append(row)
    return rows, [held[s] for _, s in sorted(queue, key=lambda entry: entry[1])]


def pack_window(lengths, capacity, aged, full=0.98):
    """Rows of a window of a stream, each index once → (rows, indices that wait for the next window).

    A row filled less than `full` waits, so that the next window's documents can complete it; but at most a quarter of the rows, and none
    that holds an index in `aged`, which waited before. pack_window([5, 4, 1, 2], 5, set()) → ([[0], [1, 2]], [3])
    """
    rows = plan_rows(lengths, capacity)
    fill = [sum(lengths[i] for i in row) / capacity for row in rows]
    poor = [r for r in range(len(rows)) if fill[r] < full and not any(i in aged for i in rows[r])]
    waiting = set(sorted(poor, key=lambda r: (fill[r], r))[: max(1, len(rows) // 4)])
    return [row for r, row in enumerate(rows) if r not in waiting], [i for r in sorted(waiting) for i in rows[r]]
