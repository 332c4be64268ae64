"""Benchmarks: results and a reference go in; numbers with intervals and a report of how they came about go out.

::

    inputs             results folders, CSVs, references: read strictly
    detect             heatmap to lesion detections
    slide_features     heatmap to one score a slide: Wang's features and a random forest
    camelyon16_slides  results, annotations, reference and exclusions, slide by slide
    camelyon16_groups  FROC and AUROC of some of the slides
    camelyon16         lesion FROC and slide AUROC
    camelyon17         lesion size to slide label to patient stage; quadratic kappa
    cases              CSVs with labels and scores, joined
    subgroups          some of the cases beside all of them
    tables             any labels in a CSV: classification, grades, calibration, subgroups, comparison of two runs
    segmentation       overlap of regions
    report             report.json, CSVs, plots, one HTML page
"""
