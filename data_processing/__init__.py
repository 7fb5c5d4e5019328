"""From tables and public data sets to the records that finetune.py reads.

Start: `python data_processing/data_processing.py`.
"""
