"""Which documents share a row. Pure; no torch."""


def plan_rows(lengths, capacity):
    """Best fit, longest first: plan_rows([5, 3, 2], capacity=5) → [[0], [1, 2]]. No index is lost.

    O(n·capacity/64): an integer's bits say which free spaces exist. ValueError for a length over the capacity.
    """
    rows, free, existing = [], [[] for _ in range(capacity + 1)], 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ValueError(f"lengths[{index}]={length} must be between 1 and the row's capacity {capacity}; cut or drop it first")
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
