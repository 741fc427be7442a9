"""From data sets to batches, in stops:

1. sources: where rows lie, and how they are read
2. formats: a row → messages
3. documents: messages → ids and mask, with what becomes of those that are too long; texts: the same for plain text
4. packing: lengths → a plan of rows
5. collate: a row's documents → tensors of one fixed shape
6. planned: batches of whole epochs; streamed: batches of endless streams, by readers and windows

reports counts what is left out, workers makes batches ahead, identity tells data sets apart.
"""
