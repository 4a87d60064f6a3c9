"""The reference: transformers' model and processors, weights in memory only while used."""
