"""The phantom cohort: an analytic head with the five bleeds and their mimics, as DICOM in RSNA's form."""
