"""Raw files -> webdataset tars + parquet index + manifest.

    cli         the verbs; thin
    recipe      the parameters that the bytes of a data set depend on, and how they are written as options
    build       two passes over a folder of staged work; killed at any instant, it goes on where it was
    sources     which files, in which order, and how they are opened
    text        the modality of text: a source file -> samples          (image and audio will stand beside it)
    stage       first pass: source files -> their samples' bytes and an index
    split       pure functions: duplicates, splits, pieces, shards
    writer      second pass: a shard's tar and parquet
    pool        work in processes, with progress
    verify      every byte against its hash
    stats       what is in a data set

Imports of the library: only mbtrain.shards (the format) and mbtrain.errors. Never torch.
"""
