"""From a data set's address to packed sequences on disk.

This is the way of a row, from top to bottom; each arrow is one call, and nothing is converted back:

    spec.dataset.source    an address; or those of spec.dataset.mix
      locate.find_data -> files.DataFiles           the files, downloaded or mounted; hub_splits chooses them on the hub
      reading.read_rows -> rows.Row                 one row, unparsed, with its location; json_reader, table_reader
      formats.RowReader.read -> examples.Example    what is trained on: Conversation, PromptCompletion or PlainText
      chat_template.Tokenizer.render -> Rendered    its text, and the spans of characters that are targets
      chat_template.Tokenizer.tokenize -> chunks.TokenizedRow    its token ids, and which of them are targets
      tokenize.tokenize -> chunks.Chunk             4096 rows in a file, so that an interrupted attempt resumes
      chunks.TokenizedRows                          the rows of all chunks; from here on a row is an index into them
      duplicates.first_equal, selection.select_rows -> Selection    which rows are trained on and held out
      packing.pack -> Arrangement                   which rows each sequence of a split has
      mix.Mix, epochs.EpochArrangements             with a mix: the rows of each epoch, and its sequences
      prepared.write_split                          the file of a split
    train: prepared.PreparedDataset -> PackedSequence    one sequence, read back; model.batch makes batches of them

`build.DatasetBuilder` walks down to the rows of a `dataset.Dataset`; `Dataset.write` does the rest.

To add a data format, add an entry to `formats._FORMATS`, and its name and columns to `RowFormat` and `Columns` of
`qlora_api.dataset`; to add a file kind, an entry to `reading._READERS` and its ending to `files.data_kind`. Whoever
reads raises BAD_DATASET with the row's location, as the cases in `tests/support/bad_data` expect.
"""
