
project, html_title, copyright = "SHARP-Distill", "SHARP-Distill", "the SHARP-Distill workbook authors, MIT licence"
extensions, root_doc, html_theme = ["myst_nb", "sphinx_copybutton"], "index", "furo"
nb_execution_mode, nb_render_markdown_format, nb_ipywidgets_js = "off", "myst", {}
myst_heading_anchors, html_static_path, html_css_files = 4, ["."], ["site.css"]
html_show_sourcelink, html_copy_source, templates_path = False, False, []
nb_mime_priority_overrides = [("*", "text/html", 0), ("*", "image/png", 1)]
