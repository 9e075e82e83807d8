"""Classifies millions of pictures with Ray, by the same archive and the same stages as the server.

    addresses --plan--> parts --read--> bytes --decode--> pixels --model--> rows --write--> Parquet

A part is at most 256 pictures and one file of results, written whole or not at all. What runs on
the nodes (`archive`, `storage`, `schema`, `stages` and `pipeline`) imports nothing of the other
folders but the handler, and that from the archive itself.
"""
