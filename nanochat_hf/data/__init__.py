"""How a row of a data set becomes part of a batch, in six stops, shown with one conversation.

1. `sources` says which rows of which data set; `loading` reads them with `nanochat_hf.files`, each with its place.

   >>> from nanochat_hf.files.data_file import Place, Raw
   >>> from nanochat_hf.data.sources import SourceConfig
   >>> source = SourceConfig(path="chats.jsonl", columns={"completion": "answer"})
   >>> line = b'{"prompt": "hi", "answer": "yes", "score": 5}'
   >>> raw = Raw(line, Place("chats.jsonl", "line", 1))

2. `formats` (with `columns`, `tool_calls` and `weights`) turns a row into messages; `conversations` checks them and
   names the parts of the row that were not used.

   >>> from nanochat_hf.data.conversations import convert
   >>> converted = convert(raw, source)
   >>> converted.conversation
   {'messages': [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yes'}]}
   >>> converted.ignored
   ('score',)

3. `tokenising` renders conversations to ids and a mask of the targets, and keeps them for later runs (`code_key` tells
   when they must be rendered again). `overlong` cuts conversations that are longer than a row; `documents` holds the
   result. `texts` does the same for plain text.

   >>> from nanochat_hf.conversation import PlainEncoder
   >>> from nanochat_hf.tokenizer import train_tokenizer
   >>> tokenizer = train_tokenizer(["hi yes"], 265)  # a token for each byte, and nine special ones
   >>> encoder = PlainEncoder(tokenizer)
   >>> ids, mask, lengths = encoder.render([converted.conversation])
   >>> tokenizer.decode(ids[mask == 1])
   'yes<|assistant_end|>'
   >>> from nanochat_hf.data.overlong import Fit
   >>> from nanochat_hf.data.reports import SourceReport
   >>> fit = Fit(12, encoder.special["<|bos|>"], encoder.special["<|user_start|>"])
   >>> report = SourceReport("chats.jsonl")
   >>> [(start, stop)] = fit.spans(ids, mask, report)
   >>> document = {"ids": ids[start:stop], "mask": mask[start:stop]}

4. `packing` plans which documents share a row: of all documents at once, or of a stream's window (`windows`).

   >>> from nanochat_hf.data.packing import plan_rows
   >>> plan_rows([len(document["ids"])], capacity=12)
   [[0]]

5. `collate` lays the rows out as tensors of one shape.

   >>> from nanochat_hf.data.collate import PackingCollator
   >>> batch = PackingCollator(11, tokenizer.pad_token_id)([[document]])
   >>> [tokenizer.decode([label]) for label in batch["shift_labels"][0].tolist() if label >= 0]
   ['y', 'e', 's', '<|assistant_end|>']

6. `batches` is what the engine sees: endless batches with exact state and a report. `planned` (6a) plans whole epochs
   before the first step. `streamed` (6b) packs the rows that `readers` give out, window by window. `workers` makes
   batches ahead.

`reports` counts what was cut, left out and ignored at every stop; `identity` tells data sets apart on resuming.
"""
