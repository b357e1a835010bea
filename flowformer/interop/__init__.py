"""Where the library meets others: published weights, and estimators in the manner of scikit-learn and aeon."""
