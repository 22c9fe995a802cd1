"""The page around a report: its style sheet and its frame, `{title}` and `{body}` left open."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1120px; color: #222; background: #fff;
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #ccc; }
.lead { font-size: 1.05rem; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid #e6e6e6; }
th { font-weight: 600; }
tr > :first-child { text-align: left; }
tr > :last-child { padding-right: 0; }
table.words th, table.words td { text-align: left; white-space: normal; min-width: 6rem; }
table.words { width: 100%; }
table.words tr > :first-child { width: 30%; }
table.bench { width: 100%; max-width: 560px; }
table.times { width: 100%; max-width: 560px; }
table.times .wide { width: 60%; padding-left: .5rem; vertical-align: middle; }
table.times i { display: block; height: .7rem; background: #2a6f97; }
figure { margin: 0; max-width: 560px; }
figcaption { font-size: .8rem; text-align: center; }
details { margin-top: .8rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.pair { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.many { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); }
.kept, .gone { font-weight: 600; border-bottom: .35rem solid #2a6f97; }
.gone { border-color: #dfa27a; }
pre { overflow-x: auto; padding: .8rem; background: #f5f5f5; font-size: .85rem; }
@media (max-width: 480px) {
  body { padding: .8rem; font-size: 14px; }
  th, td { padding-right: .4rem; }
  table:not(.words) { font-size: .85rem; width: 100%; }
  table:not(.words) th, table.bench td { white-space: normal; overflow-wrap: normal; }
}
summary { cursor: pointer; }
</style>
</head>
<body>
{body}
</body>
</html>
"""
