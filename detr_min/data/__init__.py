"""Data sets: synthetic shapes, folders in COCO layout, and the batches made of them.

    shapes  layouts  coco_json  coco_folder  transforms  batches  dataset
"""
