"""Records of runs as one page of HTML: curves, a table, and the samples that flipped. `python -m mikv.report RUN...`"""
