"""What routes and pages say of a model: profiles, their figures and reports."""
