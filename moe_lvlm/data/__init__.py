"""Data: files of records, mixtures, templates, samples, batches, the order of a run.

Light to import, since the shipped packs are found through this package; take names from the modules:
`mixture` (build_dataset, open_records), `order`, `loader`, `ledger`, `collator`, `sample`, `templates`, `errors`.
"""
