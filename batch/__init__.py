"""Classify millions of images on Ray with the server's archive and pipeline stages.

    addresses --plan--> parts --read--> bytes --decode--> pixels --model--> rows --write--> Parquet

A part is at most 256 images and one result file, written atomically. The modules that run on Ray's
workers (`archive`, `storage`, `schema`, `stages` and `pipeline`) import only `batch`,
`classification_client` and `handler` from this repository, the latter from the archive.
"""
