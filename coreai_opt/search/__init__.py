"""Chooses a compression for each layer of a model, within a budget of bits.

:func:`search` measures what each candidate does to the model's outputs, one layer at a time, and assigns
candidates to layers so that the damage is least. Quantization, palettes and sparsity compete.
"""

from coreai_opt.search.candidates import Candidate, default_candidates
from coreai_opt.search.measuring import Measurement, Metric
from coreai_opt.search.result import SearchResult
from coreai_opt.search.searching import search

__all__ = ["Candidate", "Measurement", "Metric", "SearchResult", "default_candidates", "search"]
