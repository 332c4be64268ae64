"""Benchmarks: compare results with a reference, and report metrics with intervals and how they were measured.

::

    inputs             strict readers of references and annotations
    detect             heatmap to lesion detections
    slide_features     heatmap to one score per slide: Wang's features and a random forest
    camelyon16_slides  joins results, annotations, reference and exclusions by slide
    camelyon16_groups  FROC and AUROC of subgroups of slides
    camelyon16         lesion FROC and slide AUROC
    camelyon17         lesion size to slide label to patient stage; quadratic kappa
    cases              joins labels and scores from CSVs
    subgroups          a metric of a subgroup beside that of all cases
    tables             labels in a CSV: classification, grades, calibration, subgroups, comparison of two runs
    segmentation       overlap of regions with annotations
    report             report.json, CSVs, plots, one HTML page
"""
