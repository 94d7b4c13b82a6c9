"""vlgpt: an open implementation of VL-GPT (arXiv 2312.09251).

Importing this package has no side effect. The modules, from the bottom up: `document` and `tokens` say what a
training example is, `shards` and `data` bring it from disk to a batch, `models` and `stages` are what is trained,
`train` is the one loop, `generate` and `export` are what comes out of it.
"""

__version__ = "0.1.0"
