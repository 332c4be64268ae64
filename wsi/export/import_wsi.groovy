// Puts what `wsi export qupath` wrote into the images of the open project, and saves them.
//
// Project written by wsi: open it, then Automate > Project scripts > import_wsi > Run.
// A project of your own: set FOLDER to what -o of `wsi export qupath` named. Images are found by their names.
// Without a window: QuPath script --project=project.qpproj scripts/import_wsi.groovy [--args=FOLDER]
// Again is safe: objects that are there already are replaced, everything else is left alone. Close images first.

import qupath.lib.io.PathIO

def FOLDER = null
try {
    FOLDER = FOLDER ?: (args ? args[0] : null)
} catch (MissingPropertyException e) {
    // run without arguments
}

def project = getProject()
if (project == null) {
    println 'Open a project first'
    return
}
FOLDER = FOLDER ?: project.getPath().getParent().toString()
for (entry in project.getImageList()) {
    def name = entry.getOriginalImageName()
    def names = [name, name.replaceFirst(/\.[^.]+$/, '')]
    def folder = names.collect { new File(FOLDER, 'objects/' + it) }.find { it.isDirectory() }
    if (folder == null) {
        println name + ': nothing of wsi in ' + FOLDER
        continue
    }
    def imageData = entry.readImageData()
    def hierarchy = imageData.getHierarchy()
    for (file in folder.listFiles().findAll { it.name.endsWith('.geojson.gz') }.sort()) {
        def objects = PathIO.readObjects(file)
        def ids = objects.collect { it.getID() } as Set
        hierarchy.removeObjects(hierarchy.getAllObjects(false).findAll { it.getID() in ids }, true)
        hierarchy.addObjects(objects)
        println name + ': ' + objects.size() + ' objects of ' + file.name
    }
    entry.saveImageData(imageData)
}
project.syncChanges()
println 'Done. Measure > Show measurement maps colours tiles by their measurements.'
