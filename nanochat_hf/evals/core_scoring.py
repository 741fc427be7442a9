"""CORE in batches: the tokens that the options of an item share run once, and logits are computed only where they are read."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .bpb import CHUNK, beginning, encode_texts
from .core import CoreResult, centred, prompts, spans
from .core import common_length as shared_beginning
from .scoring import Scorer


class Packed:
    """One row of a batch: the common beginning of some texts of an item, then what follows it in each.

    `reads`: for each text, the places of the row whose states predict its scored tokens; `targets`: those tokens.
    A text's last token is never read, for nothing after it is predicted.
    """

    def __init__(self, item, options, texts, share):
        self.item, self.options = item, options  # item's number, and which of its options the texts are
        inputs = [ids[:-1] for ids, _ in texts]
        shared = shared_beginning(inputs) if share else 0
        self.ids, self.positions, self.branch = list(inputs[0][:shared]), list(range(shared)), [0] * shared
        self.reads, self.targets = [], []
        for number, (own, (ids, start)) in enumerate(zip(inputs, texts, strict=True), 1):
            moved = len(self.ids) - shared  # where this text's tokens after the beginning went
            self.reads.append([p if p < shared else p + moved for p in range(start - 1, len(own))])
            self.targets.append(ids[start:])
            self.ids += own[shared:]
            self.positions += range(shared, len(own))
            self.branch += [number] * (len(own) - shared)
        self.forks = shared > 0 and len(self.ids) > shared  # choices of one token leave nothing behind the beginning

    def __len__(self):
        return len(self.ids)


def pack(task, items, indices, tokenizer, positions, share):
    """Rows for the items with these numbers; options of one item share a row where `share` allows it and shortens the work."""
    texts = [prompts(task, items, i) for i in indices]
    encoded = iter(encode_texts(tokenizer, [text for options in texts for text in options]))
    start, rows = beginning(tokenizer), []
    for index, options in zip(indices, texts, strict=True):
        scored = spans(task, [start + next(encoded) for _ in options], positions)
        together = share and len(scored) > 1 and shared_beginning([ids for ids, _ in scored]) > 1
        if together:
            rows.append(Packed(index, range(len(scored)), scored, True))
        else:
            rows += [Packed(index, [n], [one], False) for n, one in enumerate(scored)]
    return rows


def _batches(rows, batch_tokens):
    """Rows of like length, the longest first (memory runs out at once or never), with and without branches apart."""
    for shared in (True, False):
        left = sorted((row for row in rows if row.forks is shared), key=len)
        while left:
            yield shared, [left.pop() for _ in range(min(len(left), max(1, batch_tokens // len(left[-1]))))]


def _padded(lists, device):
    """Lists of numbers → (B, T), filled up behind with −1."""
    longest = max(map(len, lists))
    return torch.tensor([[*one, *[-1] * (longest - len(one))] for one in lists], device=device)


@torch.no_grad()  # not inference_mode, which XLA tensors refuse
def _score(scorer, rows, shared):
    """For each text of `rows`: (mean loss of its scored tokens, whether all of them are the likeliest)."""
    device = scorer.model.device
    ids = _padded([row.ids for row in rows], device).clamp(min=0)
    if shared:
        states = scorer.tree_states(
            ids,
            _padded([row.positions for row in rows], device).clamp(min=0),
            _padded([row.branch for row in rows], device),
        )
    else:
        states = scorer.states(ids)  # padded behind, where causal attention never looks
    width = ids.shape[1]
    places = torch.tensor(
        [r * width + p for r, row in enumerate(rows) for reads in row.reads for p in reads], device=device
    )
    targets = torch.tensor([t for row in rows for targets in row.targets for t in targets], device=device)
    nll, best = [], []
    for place, target in zip(places.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = scorer.logits(states.flatten(0, 1)[place])  # (n, V)
        nll.append(F.cross_entropy(logits, target, reduction="none"))
        best.append(logits.argmax(-1) == target)
    counts = [len(t) for row in rows for t in row.targets]
    pairs = zip(torch.cat(nll).cpu().split(counts), torch.cat(best).cpu().split(counts), strict=True)
    return [(loss.mean().item(), bool(hit.all())) for loss, hit in pairs]


def evaluate_core_task(
    model,
    tokenizer,
    task,
    *,
    limit=None,
    batch_tokens=8192,
    rank=0,
    world_size=1,
    scorer=None,
    progress=True,
    group=512,
):
    """Which of the task's items the model gets right: float tensor (items,), 1 or 0; 0 for items of other ranks, so that ranks add up.

    `limit` items at most; `batch_tokens` positions in a forward pass; texts are tokenised `group` items at a time. ValueError when items
    are too few for the examples before each.
    """
    items = task.chosen(limit)
    scorer = scorer or Scorer(model)
    share = task.kind != "language_modeling" and scorer.can_share()
    positions = getattr(scorer.config, "max_position_embeddings", None)
    right, mine = torch.zeros(len(items)), range(len(items))[rank::world_size]
    with tqdm(total=len(mine), desc=task.label, unit="item", disable=not progress, leave=False) as bar:
        for first in range(0, len(mine), group):
            part = mine[first : first + group]
            scores = {i: {} for i in part}
            for shared, rows in _batches(pack(task, items, part, tokenizer, positions, share), batch_tokens):
                found = iter(_score(scorer, rows, shared))
                for row in rows:
                    scores[row.item] |= {option: next(found) for option in row.options}
            for i, options in scores.items():
                if task.kind == "language_modeling":
                    right[i] = options[0][1]
                else:  # the first of equals
                    right[i] = min(options, key=lambda n, options=options: (options[n][0], n)) == items[i]["gold"]
            bar.update(len(part))
    return right


def evaluate_core(
    model,
    tokenizer,
    tasks,
    missing=(),
    *,
    limit=None,
    batch_tokens=8192,
    rank=0,
    world_size=1,
    reduce=None,
    progress=True,
):
    """All tasks → CoreResult. `reduce` sums a tensor over ranks; each rank takes its share of the items.

    Weights split by FSDP2 need all ranks in every forward pass: then each rank evaluates all items.
    """
    if not tasks:
        raise ValueError("CORE: no task has a data file; nothing could be evaluated")
    scorer, rows = Scorer(model), []
    alone = scorer.sharded or reduce is None
    for task in tasks:
        share = (0, 1) if alone else (rank, world_size)
        right = evaluate_core_task(
            model,
            tokenizer,
            task,
            limit=limit,
            batch_tokens=batch_tokens,
            rank=share[0],
            world_size=share[1],
            scorer=scorer,
            progress=progress,
        )
        accuracy = (right if alone else reduce(right)).mean().item()
        rows.append(
            {
                "task": task.label,
                "kind": task.kind,
                "shots": task.num_fewshot,
                "items": len(right),
                "accuracy": accuracy,
                "baseline": task.baseline,
                "centred": centred(accuracy, task.baseline),
            }
        )
    return CoreResult(rows, list(missing))
