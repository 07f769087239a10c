"""Raw files -> webdataset tars + parquet index + manifest.

    cli         the verbs; thin
    recipe      the parameters that the bytes of a data set depend on, and how they are written as options
    build       two passes over a folder of staged work; killed at any instant, it goes on; in parts, by many machines
    append      new sources for a finished data set
    estimate    what a job would make, from a look at some of its files
    job         what a job is, on disk
    locks       one job at a time in a folder, or the parts of one
    sources     which files, in which order; the types that pass from reader to stage
    remote      files on the network, by fsspec
    reading     a source file's bytes, decompressed, as a stream
    archives    the members of tars and zips
    items       a source file -> its items: itself, the members of an archive, the values of records
    text        the modality of text: an item -> its sample              (image and audio stand beside it)
    wording     names and errors of others, as they stand in messages
    modalities  a modality made again from what a manifest says of it
    stage       first pass: source files -> an index of their samples, and the bytes of those that must be copied
    near        near-duplicates of text, by MinHash
    split       pure functions: duplicates, splits, pieces, shards
    plan        between the passes: which samples are kept, and the split and shard of each
    writer      second pass: a shard's tar and parquet
    rejected    what became no sample, and why
    pool        work in processes, with progress
    cluster     work on a Ray cluster
    verify      every byte against its hash
    stats       what is in a data set

Imports of the library: only mbtrain.shards (the format) and mbtrain.errors. Never torch.
"""
