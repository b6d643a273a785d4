"""From a data set's address to packed sequences on disk.

This is the way of a row, from top to bottom; each arrow is one call, and nothing is converted back:

    spec.dataset.source    an address; or those of spec.dataset.mix
      read.locate.find_data -> files.DataFiles      the files, downloaded or mounted; hub_splits chooses them on the hub
      read.reading.read_rows -> rows.Row            one row, unparsed, with its location; json_reader, table_reader
      examples.formats.RowReader.read -> Example    what is trained on: Conversation, PromptCompletion or PlainText
      render.chat_template.Tokenizer.render -> Rendered    its text, and the spans of characters that are targets
      render.chat_template.Tokenizer.tokenize -> TokenizedRow    its token ids, and which of them are targets
      tokenize.chunk_maker.tokenize -> chunks.Chunk    4096 rows in a file, so that an interrupted attempt resumes
      tokenize.chunks.TokenizedRows                 the rows of all chunks; from here on a row is an index into them
      selection.select_rows -> Selection            which rows are trained on and held out
      packing.pack -> Arrangement                   which rows each sequence of a split has
      epochs.Mix, epochs.EpochArrangements          with a mix: the rows of each epoch, and its sequences
      prepared.write_split                          the file of a split
    train: prepared.PreparedDataset -> PackedSequence    one sequence, read back; model.losses makes batches of them

`build.DatasetBuilder` walks down to the rows of a `dataset.Dataset`; `Dataset.write` does the rest.

Readers raise BAD_DATASET with the row's location.
"""
